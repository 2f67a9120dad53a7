"""Models on their way into onnxruntime with their weights by reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from raqu_onnx import session_model as module
from raqu_onnx.errors import ModelError
from raqu_onnx.evaluation import make_session
from raqu_onnx.model_io import load_model, save_model, to_proto
from raqu_onnx.session_model import session_model

if TYPE_CHECKING:
    from pathlib import Path

    from raqu_onnx.evaluation import Level

# 64 KiB and more go by reference.
ROWS, COLUMNS = 160, 120


def model_of(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(dtype)


def network() -> onnx.ModelProto:
    return model_of(
        f"g (float[N,{ROWS}] x) => (float[N,{COLUMNS}] y) {{ m = MatMul (x, w) y = Add (m, b) }}",
        w=normal(ROWS, COLUMNS),
        b=normal(COLUMNS),
    )


@pytest.mark.parametrize("level", ["disable-all", "enable-all", "simulate"])
@pytest.mark.parametrize("external", [False, True])
def test_outputs_are_those_of_the_whole_message(tmp_path: Path, level: Level, external: bool) -> None:
    save_model(load_model(network()), tmp_path / "net.onnx", external_data=external)
    model = load_model(tmp_path / "net.onnx")
    x = normal(5, ROWS)
    whole = make_session(to_proto(model).SerializeToString(), level=level, threads=1)
    light = make_session(session_model(model), level=level, threads=1)
    np.testing.assert_array_equal(light.run(None, {"x": x})[0], whole.run(None, {"x": x})[0])


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16])
def test_types_that_numpy_has_not_go_inside_the_message(kind: type) -> None:
    """The kind of float8_e5m2 is that of numpy's own floats."""
    weight: np.ndarray = normal(ROWS, 4 * COLUMNS).astype(kind)
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 19]> g (float[N,{ROWS}] x) => (float[N,{4 * COLUMNS}] y)'
        "{ f = Cast <to = 1> (w) y = MatMul (x, f) }"
    )
    proto.graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(weight, name="w")))
    session = make_session(session_model(load_model(proto)), threads=1)
    x = normal(2, ROWS)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_large_weights_stay_out_of_the_message_and_the_model_as_it_was() -> None:
    model = load_model(network())
    before = to_proto(model).SerializeToString(deterministic=True)
    source = session_model(model)
    assert set(source.weights) == {"w"}
    assert source.weights["w"] is model.graph.initializers["w"].const_value
    assert source.proto.ByteSize() < 2000
    assert to_proto(model).SerializeToString(deterministic=True) == before


def test_no_weight_is_read(tmp_path: Path) -> None:
    save_model(load_model(network()), tmp_path / "net.onnx", external_data=True)
    model = load_model(tmp_path / "net.onnx", check_weights=False)
    (tmp_path / "net.onnx.data").unlink()
    source = session_model(model)
    with pytest.raises(ModelError, match=r"^model: its weights cannot be read: "):
        make_session(source)


def test_weights_that_the_message_no_longer_names_are_not_handed_over() -> None:
    source = session_model(load_model(network()))
    del source.proto.graph.initializer[:]
    source.proto.graph.input.extend(
        [
            onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [ROWS, COLUMNS]),
            onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [COLUMNS]),
        ]
    )
    feeds = {"x": normal(2, ROWS), "w": np.zeros((ROWS, COLUMNS), np.float32), "b": np.ones(COLUMNS, np.float32)}
    assert make_session(source).run(None, feeds)[0].tolist() == np.ones((2, COLUMNS)).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, np.int8, ml_dtypes.bfloat16])
def test_weights_of_any_type(dtype: type) -> None:
    kind = onnx.TensorProto.DataType.Name(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))).lower()
    weight: np.ndarray = (normal(300, 300) * 50).astype(dtype)
    proto = model_of(
        "g (float[300] x) => (float[300] y) { c = Cast <to = 1> (w) m = MatMul (x, c) y = Relu (m) }", w=weight
    )
    source = session_model(load_model(proto))
    assert bool(source.weights) is (kind != "bfloat16"), kind
    x = np.zeros(300, np.float32)
    x[7] = 1
    found = make_session(source, threads=1).run(None, {"x": x})[0]
    np.testing.assert_array_equal(found, np.maximum(weight[7].astype(np.float32), 0))


def test_weights_of_bodies_stay_in_the_message() -> None:
    proto = model_of(
        "g (float[N,150] x, bool yes) => (float[N,150] y) { y = If (yes) <"
        " then_branch = one () => (float[N,150] p) { p = MatMul (x, w) },"
        " else_branch = two () => (float[N,150] q) { q = MatMul (x, v) } > }",
        w=normal(150, 150),
    )
    body = next(a.g for a in proto.graph.node[0].attribute if a.name == "else_branch")
    body.initializer.append(onnx.numpy_helper.from_array(-normal(150, 150), "v"))
    source = session_model(load_model(proto))
    assert set(source.weights) == {"w"}
    session = make_session(source, threads=1)
    x = normal(2, 150)
    one, two = (session.run(None, {"x": x, "yes": np.array(yes)})[0] for yes in (True, False))
    np.testing.assert_array_equal(one, -two)


def test_constants_in_nodes_beyond_a_message_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = network()
    constant = onnx.helper.make_node("Constant", [], ["w"], value=proto.graph.initializer[0])
    nodes = [constant, *proto.graph.node]
    del proto.graph.initializer[0], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    monkeypatch.setattr(module, "LARGEST_PROTO", 70_000)
    with pytest.raises(ModelError, match=r"^model: 77,280 bytes of constants in nodes and bodies do not fit"):
        session_model(ir.from_proto(proto))
