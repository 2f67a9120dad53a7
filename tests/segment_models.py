"""Models run step by step, held against the whole graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from tensors import normal

from raqu_onnx.annotations import MAPPED, mapped_nodes
from raqu_onnx.evaluation import make_session
from raqu_onnx.model_io import load_model, to_proto
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.segments import NodeRunner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir


HEADER = '<ir_version: 10, opset_import: ["": 18]>'


Batches = list[dict[str, np.ndarray]]


def mapped_model(text: str, weights: Mapping[str, Sequence[int]]) -> ir.Model:
    """A tidied model; weights are given by their shapes."""
    proto = onnx.parser.parse_model(f"{HEADER} {text}")
    for seed, (name, shape) in enumerate(weights.items()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(*shape, seed=seed, size=0.5), name))
    model = TidyPass()(load_model(proto)).model
    AnnotateTilingPass()(model)
    return model


def runner_of(model: ir.Model) -> NodeRunner:
    return NodeRunner(model, [MAPPED.require(node) for node in mapped_nodes(model)], threads=1)


def all_values(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every value of the whole model run at once."""
    proto = to_proto(model)
    outputs = [name for node in proto.graph.node for name in node.output if name]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    session = make_session(proto.SerializeToString(), level="disable-all", threads=1)
    return {**feeds, **dict(zip(outputs, session.run(outputs, feeds), strict=True))}


def check(model: ir.Model, batches: Batches) -> NodeRunner:
    """Run step by step; every input and output is that of the whole model, and only what is needed is held."""
    runner = runner_of(model)
    expected = [all_values(model, feeds) for feeds in batches]
    constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    values: dict[str, list[Any]] = {name: [feeds[name] for feeds in batches] for name in batches[0]}
    assert [step.node.name for step in runner.steps] == [node.name for node in mapped_nodes(model)]
    for index, step in enumerate(runner.steps):
        node = step.node
        x = runner.prepare(step, values, len(batches))
        bias = None
        if node.op_type != "MatMul":
            channels = np.zeros(node.layout.groups * node.layout.kernels, np.float32)
            bias = channels if node.bias_name is None else constants[node.bias_name]
        y = runner.run(step, x, constants[node.weight_name], bias)
        assert len(x) == len(y) == len(batches)
        for whole, got_x, got_y in zip(expected, x, y, strict=True):
            np.testing.assert_allclose(got_x, whole.get(node.input_name, got_x), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(got_y, whole[node.output_name], rtol=1e-4, atol=1e-5)
        values[node.input_name], values[node.output_name] = x, y
        if step.partner is not None:
            partner = runner.partner(step, values, len(batches))
            assert len(partner) == len(batches)
            for whole, got in zip(expected, partner, strict=True):
                np.testing.assert_allclose(got, whole[step.partner], rtol=1e-4, atol=1e-5)
        for name in step.spent:
            del values[name]
        later = {name for step in runner.steps[index + 1 :] for name in (*step.needs, *step.partner_needs)}
        assert set(values) <= later, "held longer than it is needed"
    assert not values
    return runner


def pictures(*shapes: tuple[int, ...], name: str = "x") -> Batches:
    return [{name: normal(*shape, seed=100 + seed, size=0.5)} for seed, shape in enumerate(shapes)]
