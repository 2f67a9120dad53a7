"""Models from ONNX text, and what tests of passes ask of them before and after."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def model_of(text: str, *, header: str = HEADER, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text; initializers of a few hundred numbers come as arrays."""
    proto = onnx.parser.parse_model(f"{header} {text}")
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, feeds)


def assert_same(before: ir.Model, after: ir.Model, *, seed: int = 0, tolerance: float = 1e-5) -> None:
    """Both models compute the same from random inputs (free dimensions are 3) and pass the checker."""
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in before.graph.inputs:
        if not value.is_initializer():
            shape = [d if isinstance(d, int) else 3 for d in value.shape]
            feeds[value.name] = rng.normal(size=shape).astype(value.dtype.numpy())
    assert [o.name for o in after.graph.outputs] == [o.name for o in before.graph.outputs]
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def applied(model: ir.Model, *passes: ir.passes.PassBase) -> ir.Model:
    """The model after passes; the one given stays as it was."""
    result = ir.passes.Sequential(*passes)(model.clone())
    assert result.modified
    return result.model


def unchanged(model: ir.Model, pass_: ir.passes.PassBase) -> bool:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    modified = pass_(model).modified
    same = ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert modified is not same
    return same


def statistics(channels: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "scale": rng.normal(size=channels).astype(dtype),
        "shift": rng.normal(size=channels).astype(dtype),
        "mean": rng.normal(size=channels).astype(dtype),
        "var": rng.uniform(0.5, 2, size=channels).astype(dtype),
    }


BN = "BatchNormalization <epsilon = 0.01> (%s, scale, shift, mean, var)"
