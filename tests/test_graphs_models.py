"""What real model files are like: old and new opsets, local functions, external data, float16, odd outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from raqu_onnx import inspect, model_io, optimize, session_model, validate
from raqu_onnx.config import OptimizeConfig
from raqu_onnx.errors import DataError
from raqu_onnx.evaluation import make_session
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.passes.widen_half import WidenHalfPass

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raqu_onnx.results import OptimizeResult

# In dB: what 8 bits give at least; a wrong operand gives less than 10.
BAR = 25.0
SAMPLES = 48


def normal(*shape: int, seed: int = 1, dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) / max(1.0, np.prod(shape[1:])) ** 0.5).astype(dtype)


def parsed(
    text: str, header: str = '<ir_version: 9, opset_import: ["": 18]>', **weights: np.ndarray
) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{header} {text}")
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def uniform(*shape: int, seed: int = 3, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.5, 1.5, shape).astype(dtype)


def quantized(
    source: onnx.ModelProto | Path, x: dict[str, np.ndarray], folder: Path, **settings: Any
) -> OptimizeResult:
    options = {"weight_bits": 8, "activation_bits": 8, "evaluations": 0, "threads": 1, **settings}
    return optimize(source, folder, calibration=x, selection=x, config=OptimizeConfig(**options))


def sqnr_db(reference: bytes | str, folder: Path, x: dict[str, np.ndarray], level: str = "enable-all") -> float:
    """Of all outputs together, against onnxruntime on the float original."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    expected = ort.InferenceSession(reference, options, providers=["CPUExecutionProvider"]).run(None, x)
    found = make_session(folder / "model.onnx", level=level, threads=1).run(None, x)  # type: ignore[arg-type]
    before, after = (np.concatenate([item.ravel().astype(np.float64) for item in side]) for side in (expected, found))
    return float(10 * np.log10(np.mean(before**2) / np.mean((before - after) ** 2)))


# ----------------------------------------------------------------------------------------------------- opset versions

NORM = {
    "scale": np.linspace(0.5, 1.5, 6, dtype=np.float32),
    "shift": normal(6),
    "mean": normal(6),
    "var": np.ones(6, np.float32),
}


def network(opset: int, **extra: Any) -> onnx.ModelProto:
    return parsed(
        "g (float[N,3,8,8] x) => (float[N,4] y) < int64[2] shape = {-1, 96} >"
        "{ [one] a = Conv <pads = [1,1,1,1]> (x, w, b) n = BatchNormalization (a, scale, shift, mean, var) r = Relu (n)"
        "  p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r) f = Reshape (p, shape)"
        "  [two] y = Gemm <transB = 1> (f, v, c) }",
        f'<ir_version: {extra.get("ir_version", 8)}, opset_import: ["": {opset}]>',
        w=normal(6, 3, 3, 3),
        b=normal(6),
        v=normal(4, 96),
        c=normal(4),
        **NORM,
    )


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 19, 21, 23, 24])
def test_opsets(tmp_path: Path, opset: int) -> None:
    proto = network(opset, ir_version=10)
    x = {"x": uniform(SAMPLES, 3, 8, 8)}
    result = quantized(proto, x, tmp_path / "out", weight_method="mse")
    assert set(result.bits) == {"one", "two"}
    emitted = onnx.load(tmp_path / "out" / "model.onnx")
    assert emitted.opset_import[0].version == max(13, opset)
    assert "BatchNormalization" not in {node.op_type for node in emitted.graph.node}
    assert sqnr_db(proto.SerializeToString(), tmp_path / "out", x) > BAR


def test_weights_as_inputs_as_old_exporters_list_them(tmp_path: Path) -> None:
    proto = network(8, ir_version=3)
    for item in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    x = {"x": uniform(SAMPLES, 3, 8, 8)}
    result = quantized(proto, x, tmp_path / "out", weight_method="mse")
    assert set(result.bits) == {"one", "two"}
    assert [value.name for value in onnx.load(tmp_path / "out" / "model.onnx").graph.input] == ["x"]
    assert sqnr_db(proto.SerializeToString(), tmp_path / "out", x) > BAR


def test_local_functions(tmp_path: Path) -> None:
    proto = parsed(
        "g (float[N,6] x) => (float[N,4] y) { h = own.Layer <slope = 0.1> (x, w1) y = own.Layer <slope = 0.3> (h, w2) }"
        '<domain: "own", opset_import: ["": 18]> Layer <slope> (a, weight) => (b)'
        "{ m = MatMul (a, weight) b = LeakyRelu <alpha: float = @slope> (m) }",
        '<ir_version: 9, opset_import: ["": 18, "own": 1]>',
        w1=normal(6, 5),
        w2=normal(5, 4),
    )
    x = {"x": uniform(SAMPLES, 6)}
    result = quantized(proto, x, tmp_path / "out")
    assert len(result.bits) == 2
    assert sqnr_db(proto.SerializeToString(), tmp_path / "out", x) > BAR


# ------------------------------------------------------------------------------------------------------ external data


@pytest.fixture
def tiny_messages(monkeypatch: pytest.MonkeyPatch) -> int:
    """As if a message could hold no more than 20 kB of weights."""
    limit = 20_000
    for module in (model_io, session_model):
        monkeypatch.setattr(module, "LARGEST_PROTO", limit)
    return limit


def test_models_larger_than_a_message(tmp_path: Path, tiny_messages: int) -> None:
    """In from external data, through every pass, out to external data, and checked."""
    proto = parsed(
        "g (float[N,200] x) => (float[N,90] y) { [one] a = MatMul (x, w) r = Relu (a) [two] y = Gemm (r, v, b) }",
        w=normal(200, 300),
        v=normal(300, 90),
        b=normal(90),
    )
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    x = {"x": uniform(SAMPLES, 200)}
    folder = tmp_path / "out"
    result = optimize(
        tmp_path / "net.onnx",
        folder,
        calibration=x,
        selection=x,
        evaluation=x,
        config=OptimizeConfig(weight_bits=8, activation_bits=8, evaluations=0, threads=1, weight_method="sequential"),
    )
    assert set(result.bits) == {"one", "two"}
    assert (folder / "model.onnx").stat().st_size < tiny_messages < (folder / "model.onnx.data").stat().st_size
    assert sqnr_db(str(tmp_path / "net.onnx"), folder, x) > BAR
    assert validate(folder, x, reference=tmp_path / "net.onnx", threads=1).passed


# ------------------------------------------------------------------------------------------------------------- float16


def half_network() -> onnx.ModelProto:
    return parsed(
        "g (float16[N,6] x) => (float16[N,4] y, float16[N,5] b)"
        "{ [one] a = MatMul (x, w1) [two] b = MatMul (x, w1) s = Add (a, b) [three] y = Gemm (s, w2, c) }",
        w1=normal(6, 5, dtype=np.float16),
        w2=normal(5, 4, dtype=np.float16),
        c=normal(4, dtype=np.float16),
    )


def test_layers_of_float16_compute_in_float() -> None:
    model = ir.from_proto(half_network())
    assert WidenHalfPass()(model).modified
    assert [node.op_type for node in model.graph] == [
        "Cast", "MatMul", "Cast", "MatMul", "Cast", "Add", "Cast", "Gemm", "Cast",
    ]  # fmt: skip
    assert [node.name for node in model.graph if node.op_type in ("MatMul", "Gemm")] == ["one", "two", "three"]
    assert set(model.graph.initializers) == {"w1", "w2", "c"}
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not WidenHalfPass()(model).modified
    x = {"x": uniform(7, 6, dtype=np.float16)}
    sessions = (make_session(p.SerializeToString(), level="disable-all") for p in (half_network(), ir.to_proto(model)))
    for before, after in zip(*(session.run(None, x) for session in sessions), strict=True):
        np.testing.assert_allclose(before, after, rtol=2e-3, atol=2e-3)


def test_layers_that_the_user_excludes_stay_float16(tmp_path: Path) -> None:
    x = {"x": uniform(SAMPLES, 6, dtype=np.float16)}
    result = quantized(half_network(), x, tmp_path / "out", exclude=("two",))
    assert set(result.bits) == {"one", "three"}
    emitted = onnx.load(tmp_path / "out" / "model.onnx")
    two = next(node for node in emitted.graph.node if node.name == "two")
    assert two.input[0] == "x"
    assert (
        next(item for item in emitted.graph.initializer if item.name == two.input[1]).data_type
        == onnx.TensorProto.FLOAT16
    )
    assert sqnr_db(half_network().SerializeToString(), tmp_path / "out", x) > BAR


def test_weights_of_float16_are_read_when_needed(tmp_path: Path) -> None:
    onnx.save(half_network(), tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = model_io.load_model(tmp_path / "net.onnx", check_weights=False)
    (tmp_path / "w.bin").unlink()
    WidenHalfPass()(model)
    with pytest.raises(FileNotFoundError):
        model.graph.initializers["w1"].const_value.numpy()


# ---------------------------------------------------------------------------------------------- shapes and odd outputs


def test_batchnorm_behind_relu_stays_a_node(tmp_path: Path) -> None:
    proto = parsed(
        "g (float[N,3,6,6] x) => (float[N,6,4,4] y)"
        "{ [one] a = Conv (x, w) r = Relu (a) [norm] y = BatchNormalization (r, scale, shift, mean, var) }",
        w=normal(6, 3, 3, 3),
        **NORM,
    )
    x = {"x": uniform(SAMPLES, 3, 6, 6)}
    quantized(proto, x, tmp_path / "out")
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    assert [node.name for node in nodes if node.op_type == "BatchNormalization"] == ["norm"]
    assert sqnr_db(proto.SerializeToString(), tmp_path / "out", x) > BAR


@pytest.mark.parametrize(
    ("shape", "text", "mvms"),
    [
        ("N,5,6", "f = Reshape (x, flat) y = MatMul (f, w)", 5),
        ("1,5,6", "f = Reshape (x, flat) y = MatMul (f, w)", 5),
        ("4,5,6", "f = Reshape (x, flat) y = MatMul (f, w)", 5),
        ("N,5,6", "f = Reshape (x, flat) y = Gemm (f, w)", 5),
        ("N,T,6", "f = Reshape (x, flat) y = MatMul (f, w)", None),
        ("N,5,6", "y = MatMul (x, w)", 5),
        ("N,6", "y = MatMul (x, w)", 1),
        ("5,6", "y = MatMul (x, w)", 1),
        ("N,6,3,3", "t = Transpose <perm = [0,2,3,1]> (x) f = Reshape (t, flat) y = MatMul (f, w)", 9),
    ],
)
def test_rows_of_one_sample_are_counted_behind_a_reshape(shape: str, text: str, mvms: int | None) -> None:
    body = f"g (float[{shape}] x) => (float[a, b] y) < int64[2] flat = {{-1, 6}} > {{ {text} }}"
    proto = parsed(body.replace("[a, b]", "[]"), w=normal(6, 4))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (node,) = inspect(proto).nodes
    assert node.node.mvms == mvms


def sum_of_two() -> onnx.ModelProto:
    return parsed(
        "g (float[N,3,6,6] x) => (float[N,4,4,4] c, float[N,4,4,4] y) < float[4,4,4] near >"
        "{ [one] c = Conv (x, w) [two] e = Conv (x, v) y = Add (c, e) }",
        w=normal(4, 3, 3, 3),
        v=normal(4, 3, 3, 3, seed=2),
    )


def test_only_an_output_that_onnxruntime_would_miss_is_set_apart() -> None:
    model = TidyPass()(ir.from_proto(sum_of_two())).model
    assert [node.op_type for node in model.graph] == ["Conv", "Identity", "Conv", "Add"]
    assert [value.name for value in model.graph.outputs] == ["c", "y"]
    assert not TidyPass()(model).modified
    other = sum_of_two()
    del other.graph.output[0]
    assert [node.op_type for node in TidyPass()(ir.from_proto(other)).model.graph] == ["Conv", "Conv", "Add"]


def test_states_whose_first_axis_counts_layers_are_refused_in_one_line(tmp_path: Path) -> None:
    proto = parsed("g (float[N,5,4] x, float[2,N,4] state) => (float[N,5,4] y) { y = MatMul (x, w) }", w=normal(4, 4))
    feeds = {"x": uniform(8, 5, 4), "state": uniform(2, 8, 4)}
    with pytest.raises(DataError, match=r"^[^\n]+first dimension[^\n]+$"):
        quantized(proto, feeds, tmp_path / "out")


def test_names_and_documents_of_nodes_survive(tmp_path: Path, small_net: Callable[..., onnx.ModelProto]) -> None:
    proto = small_net()
    for node in proto.graph.node:
        node.doc_string = f"about {node.name}"
        entry = node.metadata_props.add()
        entry.key, entry.value = "exporter", f"module.{node.name}"
    proto.ir_version = 10
    quantized(proto, {"input": uniform(SAMPLES, 3, 8, 8)}, tmp_path / "out")
    after = {node.name: node for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    for node in proto.graph.node:
        found = after[node.name]
        assert (found.op_type, found.doc_string) == (node.op_type, node.doc_string)
        assert list(found.attribute) == list(node.attribute)
        assert list(found.output) == list(node.output)
        assert {item.key: item.value for item in found.metadata_props}["exporter"] == f"module.{node.name}"
