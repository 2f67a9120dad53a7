"""Reading and writing models: what is accepted, what is refused in one line, and what is never opened."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from model_files import TEXT, external, proto_of, refused, run

from raqu_onnx.errors import ModelError, OutputError
from raqu_onnx.model_io import load_model, model_digest, model_inputs, save_model, to_proto


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(proto_of(), path)
    return path


# ----------------------------------------------------------------------------------------------------------- loading


def test_every_kind_of_source_loads(file: Path) -> None:
    expected = run(load_model(file))
    for source in (str(file), onnx.load(file), ir.load(file)):
        np.testing.assert_array_equal(run(load_model(source)), expected)


def test_sources_in_memory_are_not_changed(file: Path) -> None:
    for source in (onnx.load(file), ir.load(file)):
        before = ir.to_proto(source) if isinstance(source, ir.Model) else onnx.load(file)
        model = load_model(source)
        model.graph[0].name = "changed"
        model.graph[0].metadata_props["new"] = "changed"
        model.metadata_props["key"] = "changed"
        model.graph.inputs[0].name = "changed"
        model.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 3), np.float32), name="w")
        proto = source if isinstance(source, onnx.ModelProto) else ir.to_proto(source)
        assert proto.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.onnx").endswith("no such file; name a file, as in `raqu-onnx inspect model.onnx`")
    (tmp_path / "resnet.onnx").touch()
    assert refused(tmp_path / "resnt.onnx").endswith(f"no such file; did you mean {tmp_path / 'resnet.onnx'}?")
    assert refused(tmp_path / "no" / "none.onnx").endswith(f"there is no folder {tmp_path / 'no'} either")
    assert "is a folder" in refused(tmp_path)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^model of type int: give a path, an onnx\.ModelProto or an onnx_ir\.Model$"):
        load_model(42)  # type: ignore[arg-type]


def test_unreadable_kinds_of_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe)


@pytest.mark.parametrize(
    "content", [b"", b"hello, I am no model\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), bytes(64), b"\n\n\n\n"]
)
def test_not_an_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert "not an ONNX" in refused(path)


def test_truncated_anywhere_is_refused(file: Path) -> None:
    proto = proto_of()
    proto.ClearField("metadata_props")  # what is last in a file, and optional, is not missed
    whole = proto.SerializeToString()
    for length in range(1, len(whole)):
        file.write_bytes(whole[:length])
        refused(file)


def test_no_outputs(file: Path) -> None:
    proto = proto_of()
    del proto.graph.output[:]
    assert "no outputs" in refused(proto)
    file.write_bytes(proto.SerializeToString())
    assert "no outputs" in refused(file)
    model = ir.from_proto(proto_of())
    model.graph.outputs.clear()
    assert "no outputs" in refused(model)


def test_output_that_nothing_produces() -> None:
    proto = proto_of()
    proto.graph.output[0].name = "nowhere"
    assert "nothing produces the graph output 'nowhere'" in refused(proto)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT.replace("MatMul", "NoSuchOp"), "NoSuchOp"),
        (TEXT.replace("Add (h, b)", "Add (h, nobody)"), "nobody"),
        (TEXT.replace("Add (h, b)", "com.acme.Add (h, b)"), "com.acme"),
        (TEXT.replace("h = MatMul (x, w)  y =", "y = MatMul (x, w)  y ="), "y"),
    ],
)
def test_what_the_checker_refuses_is_one_line(text: str, reason: str) -> None:
    message = refused(proto_of(text))
    assert "is not a valid ONNX model" in message
    assert reason in message


def test_opset_that_nobody_knows_yet() -> None:
    assert "is of opset 999, and the installed onnx package knows" in refused(proto_of(TEXT.replace("18", "999")))


def test_graph_without_a_name_loads() -> None:
    proto = proto_of()
    proto.graph.name = ""
    assert load_model(proto).graph.name in (None, "")


def test_tensor_with_too_little_data() -> None:
    proto = proto_of()
    proto.graph.initializer[0].raw_data = bytes(44)
    assert "initializer 'w' holds more or less data" in refused(proto, check_weights=False)
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].float_data.extend([1.0] * 11)
    assert "initializer 'w' holds more or less data" in refused(proto, check_weights=False)


def test_sparse_initializer_is_refused() -> None:
    proto = proto_of()
    sparse = proto.graph.sparse_initializer.add()
    sparse.values.name = "s"
    assert "initializer 's' is sparse" in refused(proto)


# ---------------------------------------------------------------------------------------------------- finite weights


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nonfinite_weight(bad: float, dtype: type) -> None:
    weight = np.ones((2000, 600), dtype)
    weight[-1, -1] = bad
    text = TEXT.replace("float[batch, 4]", "float[batch, 2000]").replace("float[batch, 3]", "float[batch, 600]")
    proto = proto_of(text, w=weight, b=np.zeros(600, dtype))
    assert "initializer 'w' holds NaN or infinity" in refused(proto)
    load_model(proto, check_weights=False)


@pytest.mark.parametrize(("number", "fine"), [(np.nan, False), (np.inf, False), (1.0, True)])
def test_nonfinite_constant_node_behind_other_nodes(number: float, fine: bool) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[n, 1] x) => (float[n, 2] y)'
        " { c = Constant <value = float[2, 1] {1, 2}> ()  t = Transpose (c)  y = MatMul (x, t) }"
    )
    array = np.array([[1], [number]], np.float32)
    proto.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(array))
    if fine:
        load_model(proto)
    else:
        assert "constant 'c'" in refused(proto)


def test_infinity_in_a_mask_is_fine_and_nan_is_not() -> None:
    text = TEXT.replace("Add (h, b)", "Where (m, h, b)").replace("x) =>", "x, bool[3] m) =>")
    weights = {"w": np.ones((4, 3), np.float32), "b": np.full(3, -np.inf, np.float32)}
    load_model(proto_of(text, **weights))
    weights["b"][0] = np.nan
    assert "initializer 'b' holds NaN" in refused(proto_of(text, **weights))


# ------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("external_data", [None, False, True])
def test_saved_model_loads_again_with_the_same_bytes(tmp_path: Path, external_data: bool | None) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(4, 3000)).astype(np.float32), "b": np.ones(3000, np.float32)}
    model = load_model(proto_of(TEXT.replace("float[batch, 3]", "float[batch, 3000]"), **weights))
    before = to_proto(model).SerializeToString(deterministic=True)
    first, second = tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"
    for path in (first, second):
        path.parent.mkdir()
        save_model(model, path, external_data=external_data)
        onnx.checker.check_model(str(path))
    names = ["m.onnx", "m.onnx.data"] if external_data else ["m.onnx"]
    for folder in (first.parent, second.parent):
        assert sorted(p.name for p in folder.iterdir()) == names
    assert all((first.parent / n).read_bytes() == (second.parent / n).read_bytes() for n in names)
    assert to_proto(load_model(first)).graph.node == to_proto(model).graph.node
    np.testing.assert_array_equal(run(load_model(first)), run(model))
    assert to_proto(model).SerializeToString(deterministic=True) == before


def test_external_weights_move_into_one_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in", "w.bin")
    (tmp_path / "in" / "w.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
    model = load_model(path)
    save_model(model, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.onnx"]
    np.testing.assert_array_equal(run(load_model(tmp_path / "out.onnx")), run(model))


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    model = load_model(proto_of())
    for external_data in (True, False):
        with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
            save_model(model, tmp_path / "none" / "m.onnx", external_data=external_data)
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        save_model(model, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# ------------------------------------------------------------------------------------------------- digest and inputs


def test_digest_sees_every_byte(tmp_path: Path, file: Path) -> None:
    before = model_digest(file)
    assert len(before) == 64
    assert model_digest(str(file)) == before
    model = load_model(file)
    model.graph[0].name = "other"
    save_model(model, file)
    assert model_digest(file) != before
    path = external(tmp_path, "w.bin")
    digests = set()
    for byte in (0, 1):
        (tmp_path / "w.bin").write_bytes(bytes(47) + bytes([byte]))
        digests.add(model_digest(path))
    assert len(digests) == 2
    assert model_digest(proto_of()) == model_digest(proto_of())


def test_inputs_to_feed() -> None:
    model = load_model(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 18]> g (float[batch, 3, 8] x, int64[] k, bool m, float[2] d)'
            " => (float[batch, 3, 8] y) <float[2] d = {1, 2}> { y = Relu (x) }"
        )
    )
    specs = model_inputs(model)
    assert [(s.name, s.dtype, s.shape) for s in specs] == [
        ("x", np.dtype("float32"), ("batch", 3, 8)),
        ("k", np.dtype("int64"), None),
        ("m", np.dtype("bool"), ()),
    ]


def test_input_that_is_a_sequence() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (seq(float[n]) s) => (int64 y) { y = SequenceLength (s) }'
    )
    with pytest.raises(ModelError, match=r"input 's' is .*only dense tensors"):
        model_inputs(load_model(proto))
