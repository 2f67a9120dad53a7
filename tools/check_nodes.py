"""Each mapped node of an emitted model, alone, against the integer reference.

A node is cut out with its dequantized operands and all that stands between its output and the next quantizers, so that
onnxruntime fuses it as it does in the whole model. It is fed codes: those that the model itself produces, and random
ones. Where the output reaches a QuantizeLinear, codes are compared; where it stays float, values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from integer_reference import integer_sums, output_axis
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from raqu_onnx.evaluation import make_session

__all__ = ["LEVELS", "NodeFinding", "check_nodes", "run_model"]

LEVELS = ("disable-all", "enable-all")
_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What may stand between a node and the next quantizer; onnxruntime fuses these or moves the quantizer over them.
_BETWEEN = (
    "Relu", "Clip", "LeakyRelu", "MaxPool", "Flatten", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze",
)  # fmt: skip
_NEGATED = "raqu_negated_"
#: Steps, and share of the output's range, that a node may differ by.
MOST_STEPS, MOST_SHARE = 1, 1e-4


@dataclass
class NodeFinding:
    """How far one mapped node is from the reference.

    Attributes:
        node: Its name.
        op_type: Its type.
        steps: Largest difference in steps of the next quantizers by level; empty where no quantizer follows.
        share: Largest difference in shares of the output's range by level; empty where no output stays float.
        problems: What is wrong, one line each.
    """

    node: str
    op_type: str
    steps: dict[str, int] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Graph:
    """Look-ups in an emitted model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.tensors = {item.name: item for item in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {item.name for item in model.graph.output}

    def array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self.tensors[name])

    def decoded(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear of initializers behind a value."""
        node = self.producers.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.tensors:
            return None
        return node


@dataclass
class _Cut:
    """One node and its surroundings: what it reads, and where its output goes."""

    node: onnx.NodeProto
    slot: int
    before: list[onnx.NodeProto]
    codes: str
    weight: onnx.NodeProto
    bias: onnx.NodeProto | None
    between: list[onnx.NodeProto] = field(default_factory=list)
    after: list[onnx.NodeProto] = field(default_factory=list)
    quantizers: list[onnx.NodeProto] = field(default_factory=list)
    coded: dict[str, onnx.NodeProto] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)


def check_nodes(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], rng: np.random.Generator
) -> list[NodeFinding]:
    """Compare every mapped node of an emitted model with the integer reference at both optimization levels."""
    graph = _Graph(model)
    cuts = [cut for node in model.graph.node if (cut := _cut(graph, node)) is not None]
    names = list(dict.fromkeys(cut.codes for cut in cuts))
    real = dict(zip(names, run_model(model, feeds, "disable-all", names), strict=True))
    return [_check(graph, cut, real[cut.codes], rng) for cut in cuts]


def run_model(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], level: str, names: Iterable[str]
) -> list[NDArray[Any]]:
    """Values by name, of outputs or from inside a model."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    present = {item.name for item in extended.graph.output}
    wanted = list(names)
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
    session = make_session(extended.SerializeToString(), level=level, threads=1)  # type: ignore[arg-type]
    return list(session.run(wanted, dict(feeds)))


# --- cutting ------------------------------------------------------------------------------------------------------


def _cut(graph: _Graph, node: onnx.NodeProto) -> _Cut | None:
    if node.op_type not in _OPS:
        return None
    for slot in (1, 0):
        weight = graph.decoded(node.input[slot])
        chain = graph.producers.get(node.input[1 - slot])
        if weight is None or chain is None or chain.op_type != "DequantizeLinear":
            continue
        before = [chain]
        while before[0].op_type != "QuantizeLinear":
            before.insert(0, graph.producers[before[0].input[0]])
        bias = graph.decoded(node.input[2]) if len(node.input) > 2 else None
        cut = _Cut(node, slot, before[1:], before[0].output[0], weight, bias)
        _follow(graph, cut, node.output[0])
        if not (cut.coded or cut.floats):
            # Nothing reads it.
            cut.floats.append(node.output[0])
        return cut
    return None


def _follow(graph: _Graph, cut: _Cut, name: str) -> None:
    """Go on from a value to the next quantizers; what leads elsewhere is a float output."""
    leaves = name in graph.outputs
    for reader in graph.readers.get(name, []):
        if reader.op_type == "QuantizeLinear":
            _end(graph, cut, reader)
        elif _belongs(graph, reader, name):
            cut.between.append(reader)
            _follow(graph, cut, reader.output[0])
        else:
            leaves = True
    if leaves:
        cut.floats.append(name)


def _belongs(graph: _Graph, reader: onnx.NodeProto, name: str) -> bool:
    """Whether an operator only moves or shapes one value, with constants for the rest."""
    if reader.op_type == "Add":
        # A MatMul has no bias; onnxruntime makes a Gemm of it and the sum.
        return graph.producers[name].op_type == "MatMul" and any(item in graph.tensors for item in reader.input)
    rest = [item for item in reader.input[1:] if item]
    return reader.op_type in _BETWEEN and reader.input[0] == name and all(item in graph.tensors for item in rest)


def _end(graph: _Graph, cut: _Cut, quantizer: onnx.NodeProto) -> None:
    cut.quantizers.append(quantizer)
    cut.after.append(quantizer)
    code = quantizer.output[0]
    clips = [reader for reader in graph.readers.get(code, []) if reader.op_type == "Clip"]
    cut.after.extend(clips)
    cut.coded[clips[0].output[0] if clips else code] = quantizer


def _alone(graph: _Graph, cut: _Cut, codes: NDArray[np.uint8]) -> onnx.ModelProto:
    nodes = [*cut.before, cut.weight, *([cut.bias] if cut.bias else []), cut.node, *cut.between, *cut.after]
    used = {name for node in nodes for name in node.input}
    outputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in cut.coded]
    for name in cut.floats:
        # What is read inside the model and is none of its outputs is none here: onnxruntime treats outputs specially.
        nodes.append(helper.make_node("Neg", [name], [_NEGATED + name]))
        kept = name if name in graph.outputs else _NEGATED + name
        outputs.append(helper.make_tensor_value_info(kept, TensorProto.FLOAT, None))
    shape = ["N" if _is_free(graph.model) and i == 0 else size for i, size in enumerate(codes.shape)]
    return _model(graph, nodes, helper.make_tensor_value_info(cut.codes, TensorProto.UINT8, shape), outputs, used)


def _is_free(model: onnx.ModelProto) -> bool:
    return not model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")


def _model(
    graph: _Graph,
    nodes: list[onnx.NodeProto],
    source: onnx.ValueInfoProto,
    outputs: list[onnx.ValueInfoProto],
    used: set[str],
) -> onnx.ModelProto:
    tensors = [item for name, item in graph.tensors.items() if name in used]
    proto = helper.make_graph(nodes, "alone", [source], outputs, tensors)
    model: onnx.ModelProto = helper.make_model(proto, opset_imports=graph.model.opset_import)
    model.ir_version = graph.model.ir_version
    return model


# --- comparing ----------------------------------------------------------------------------------------------------


def _check(graph: _Graph, cut: _Cut, real: NDArray[np.uint8], rng: np.random.Generator) -> NodeFinding:
    finding = NodeFinding(cut.node.name, cut.node.op_type)
    model = _alone(graph, cut, real).SerializeToString()
    top = _largest_code(graph, cut.before)
    drawn = rng.integers(0, top + 1, real.shape)
    drawn[rng.random(real.shape) < 0.2] = top
    sessions = {level: make_session(model, level=level, threads=1) for level in LEVELS}  # type: ignore[arg-type]
    for kind, codes in (("its own", real), ("random", drawn.astype(np.uint8))):
        values = _reference(graph, cut, codes)
        for level, session in sessions.items():
            found = _run_alone(graph, cut, session, codes)
            for name, quantizer in cut.coded.items():
                _compare_codes(
                    graph,
                    finding,
                    f"{level}, {kind} codes",
                    level,
                    found[name],
                    values[quantizer.input[0]],
                    quantizer,
                    name,
                )
            for name in cut.floats:
                _compare_values(finding, f"{level}, {kind} codes", level, found[name], values[name])
    return finding


def _run_alone(graph: _Graph, cut: _Cut, session: Any, codes: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Codes and float values of the cut by name."""
    inner = [name for name in cut.floats if name not in graph.outputs]
    names = [*cut.coded, *(name for name in cut.floats if name not in inner), *(_NEGATED + name for name in inner)]
    found = dict(zip(names, session.run(names, {cut.codes: codes}), strict=True))
    return found | {name: -found[_NEGATED + name] for name in inner}


def _largest_code(graph: _Graph, nodes: Iterable[onnx.NodeProto]) -> int:
    """What codes are clipped to by the integer Clip among these nodes."""
    return min((int(graph.array(node.input[2])) for node in nodes if node.op_type == "Clip"), default=255)


def _reference(graph: _Graph, cut: _Cut, codes: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Exact values of the node's output and of all that follows, by name."""
    chain = cut.before[-1]
    step, zero = float(graph.array(chain.input[1])), int(graph.array(chain.input[2]))
    weight = graph.array(cut.weight.input[0]).astype(np.int64)
    scales = graph.array(cut.weight.input[1]).astype(np.float64)
    left = cut.node.op_type == "MatMul" and cut.slot == 0
    x = np.minimum(codes.astype(np.int64), _largest_code(graph, cut.before)) - zero
    sums = integer_sums(cut.node, x, weight, constant_left=left)
    axis = output_axis(cut.node, sums.ndim, constant_left=left)
    # A ConvTranspose with groups has one scale for the kernel at the same place in each.
    scales = np.tile(scales.reshape(-1), sums.shape[axis] // scales.size) if scales.size else scales
    along = [1] * sums.ndim
    along[axis] = -1
    y = sums * (step * scales).reshape(along)
    if cut.bias is not None:
        bias = graph.array(cut.bias.input[0]).astype(np.int64)
        expected = (np.float32(step) * scales.astype(np.float32)).astype(np.float32)
        if not np.array_equal(expected, graph.array(cut.bias.input[1])):
            raise ValueError(f"{cut.node.name}: the bias has other scales than input times weight")
        y = (sums + bias.reshape(along)) * (step * scales).reshape(along)
    values = {cut.node.output[0]: y}
    if cut.between:
        values |= _follow_values(graph, cut, y)
    return values


def _follow_values(graph: _Graph, cut: _Cut, y: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    names = [name for node in cut.between for name in node.output[:1]]
    used = {name for node in cut.between for name in node.input}
    source = helper.make_tensor_value_info(cut.node.output[0], TensorProto.FLOAT, [None] * y.ndim)
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    model = _model(graph, cut.between, source, outputs, used)
    session = make_session(model.SerializeToString(), level="disable-all", threads=1)
    return dict(zip(names, session.run(names, {cut.node.output[0]: y.astype(np.float32)}), strict=True))


def _compare_codes(
    graph: _Graph,
    finding: NodeFinding,
    where: str,
    level: str,
    found: NDArray[Any],
    values: NDArray[Any],
    quantizer: onnx.NodeProto,
    name: str,
) -> None:
    step, zero = float(graph.array(quantizer.input[1])), int(graph.array(quantizer.input[2]))
    top = _largest_code(graph, graph.readers.get(quantizer.output[0], []))
    expected = np.clip(np.rint(values.astype(np.float64) / step) + zero, 0, top)
    if found.shape != expected.shape:
        finding.problems.append(f"{where}: {name} has shape {found.shape}, the reference {expected.shape}")
        return
    steps = int(np.abs(found.astype(np.int64) - expected).max(initial=0))
    finding.steps[level] = max(finding.steps.get(level, 0), steps)
    if steps > MOST_STEPS:
        finding.problems.append(f"{where}: {name} is {steps} steps from the integer reference")


def _compare_values(finding: NodeFinding, where: str, level: str, found: NDArray[Any], values: NDArray[Any]) -> None:
    if found.shape != values.shape:
        finding.problems.append(f"{where}: the output has shape {found.shape}, the reference {values.shape}")
        return
    span = max(float(values.max(initial=0)), 0.0) - min(float(values.min(initial=0)), 0.0)
    error = float(np.abs(found.astype(np.float64) - values).max(initial=0))
    share = error / span if span else (0.0 if error == 0 else float("inf"))
    finding.share[level] = max(finding.share.get(level, 0.0), share)
    if share > MOST_SHARE:
        finding.problems.append(f"{where}: the output is {share:.3g} of its range from the integer reference")
