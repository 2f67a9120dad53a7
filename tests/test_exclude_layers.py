"""What `--exclude` names stays as it was exported, with what stands behind it, while the rest is rewritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import raqu_onnx
from raqu_onnx.model_io import load_model, to_proto
from raqu_onnx.passes.tidy import TidyPass

BATCHNORM = "BatchNormalization (%s, scale, shift, mean, var)"
NETWORK = f"""<ir_version: 10, opset_import: ["": 18]>
    g (float[n, 3, 8, 8] x) => (float[n, 5] y) {{
      [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
      [norm1] n1 = {BATCHNORM % "c1"}
      r1 = Relu (n1)
      [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
      [norm2] n2 = {BATCHNORM % "c2"}
      r2 = Relu (n2)
      p = GlobalAveragePool (r2)
      f = Flatten (p)
      [fc] y = Gemm <alpha = 2.0, beta = 0.5> (f, w3, b3)
    }}"""


def network(text: str = NETWORK) -> onnx.ModelProto:
    """The network with weights; its layers of 4 channels share one BatchNormalization's parameters."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "w3": (4, 5), "b3": (5,)}
    arrays = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    arrays |= {"scale": rng.normal(1, 0.1, 4), "shift": rng.normal(size=4)}
    arrays |= {"mean": rng.normal(size=4), "var": rng.uniform(0.5, 2, 4)}
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items() if name in used
    )
    return proto


def nodes_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    found = {node.name: node for node in model.graph.node}
    for node in found.values():
        node.domain = ""  # Not set and empty mean the same, but do not compare as equal.
    return found


def tidied(model: onnx.ModelProto, *exclude: str) -> onnx.ModelProto:
    return to_proto(TidyPass(exclude=exclude)(load_model(model)).model)


@pytest.mark.parametrize("pattern", ["conv1", "conv[1-9]", "Conv"])
def test_an_excluded_layer_keeps_its_weights_and_its_batch_normalization(pattern: str) -> None:
    before, after = network(), tidied(network(), pattern)
    kept = {"conv1", "norm1"} | (set() if pattern == "conv1" else {"conv2", "norm2"})
    found = nodes_of(after)
    assert set(found) & {"conv1", "norm1", "conv2", "norm2"} == kept | {"conv2"}
    for name in kept:
        assert found[name] == nodes_of(before)[name]
    arrays = {item.name: numpy_helper.to_array(item) for item in after.graph.initializer}
    for item in before.graph.initializer:
        if item.name in {name for node in kept for name in found[node].input}:
            assert np.array_equal(arrays[item.name], numpy_helper.to_array(item))
    # What is not excluded is in its one form.
    assert not found["fc"].attribute


def test_an_excluded_gemm_keeps_its_factors() -> None:
    before, after = network(), tidied(network(), "fc")
    assert nodes_of(after)["fc"] == nodes_of(before)["fc"]
    assert "norm1" not in nodes_of(after)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    results = [ort.InferenceSession(item.SerializeToString()).run(None, {"x": x})[0] for item in (before, after)]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exclude", [(), ("Gemm_0",), ("other",)])
def test_a_nameless_gemm_is_called_the_same_whether_or_not_anything_is_excluded(exclude: tuple[str, ...]) -> None:
    """A constant on the left makes it a MatMul, unless it is excluded: its name is that of what was exported."""
    model = network(
        '<ir_version: 10, opset_import: ["": 18]> g (float[5, n] x) => (float[4, n] y) { y = Gemm (w3, x) }'
    )
    found = nodes_of(tidied(model, *exclude))
    assert found["Gemm_0"].op_type == ("Gemm" if exclude == ("Gemm_0",) else "MatMul")


def test_the_whole_run_leaves_an_excluded_layer_and_its_batch_normalization(tmp_path: Path) -> None:
    data = {"x": np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)}
    result = raqu_onnx.optimize(
        network(), tmp_path / "out", calibration=data, weight_bits=8, exclude=("conv1", "fc"), threads=1
    )
    after = onnx.load(tmp_path / "out" / "model.onnx")
    found, before = nodes_of(after), nodes_of(network())
    for name in ("conv1", "norm1", "fc"):
        assert list(found[name].input)[1:] == list(before[name].input)[1:]
        assert found[name].attribute == before[name].attribute
    assert set(result.bits) == {"conv2"}
    assert result.validation is not None
    assert result.validation.passed
