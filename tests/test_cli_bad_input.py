"""Bad input: exit code 2, one line that names the culprit and the cause, and not a file touched."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Cli = Callable[..., Any]
Refused = Callable[..., str]
Snapshot = Callable[[Path], dict[str, Any]]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--evaluations", "1")


# ------------------------------------------------------------------------------------------------------------ models


def broken_model(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "broken.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def graph(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def not_onnx(_: onnx.ModelProto) -> bytes:
    return b"\x89PNG\r\n\x1a\n this is a picture" * 9


def text_file(_: onnx.ModelProto) -> bytes:
    return b"hello, world\n"


def empty(_: onnx.ModelProto) -> bytes:
    return b""


def truncated(model: onnx.ModelProto) -> bytes:
    content = model.SerializeToString()
    return content[: len(content) // 2]


def nan_weights(model: onnx.ModelProto) -> bytes:
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    return model.SerializeToString()


def infinite_weights(model: onnx.ModelProto) -> bytes:
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[0] = np.inf
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    return model.SerializeToString()


def nothing_to_map(_: onnx.ModelProto) -> bytes:
    return graph([helper.make_node("Relu", ["input"], ["out"])]).SerializeToString()


def nothing_constant(_: onnx.ModelProto) -> bytes:
    nodes = [
        helper.make_node("Transpose", ["input"], ["turned"]),
        helper.make_node("MatMul", ["turned", "input"], ["out"], "gram"),
    ]
    return graph(nodes).SerializeToString()


def quantized(_: onnx.ModelProto) -> bytes:
    weights = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8), "w": np.ones((4, 4), np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"], "quantize_input"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["out"]),
    ]
    return graph(nodes, weights).SerializeToString()


def external(model: onnx.ModelProto, location: str) -> bytes:
    tensor = model.graph.initializer[0]
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    return model.SerializeToString()


MODELS: list[tuple[Callable[[onnx.ModelProto], bytes], tuple[str, ...]]] = [
    (not_onnx, ("ONNX",)),
    (text_file, ("ONNX",)),
    (empty, ("empty",)),
    (truncated, ("cut short",)),
    (nan_weights, ("w1", "NaN")),
    (infinite_weights, ("w1", "infinity")),
    (nothing_to_map, ("no node that crossbars can compute",)),
    (nothing_constant, ("no node that crossbars can compute", "gram")),
    (quantized, ("already quantized", "quantize_input")),
    (lambda model: external(model, "absent.data"), ("w1", "absent.data")),
    (lambda model: external(model, "../outside.data"), ("w1", "../outside.data")),
    (lambda model: external(model, "/etc/hostname"), ("w1", "/etc/hostname")),
    (lambda model: external(model, "link.data"), ("w1", "link.data")),
    (lambda model: external(model, "model.onnx"), ("w1", "model.onnx")),
]


@pytest.mark.parametrize(("damage", "said"), MODELS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("command", ["optimize", "dry-run"])
def test_a_bad_model_is_refused(
    refused: Refused,
    workspace: Path,
    small_net: Callable[[], onnx.ModelProto],
    damage: Callable[[onnx.ModelProto], bytes],
    said: tuple[str, ...],
    command: str,
) -> None:
    if said[-1] == "model.onnx":
        (workspace / "model.onnx").write_bytes(b"short")  # shorter than the tensor that points into it
    (workspace.parent / "outside.data").write_bytes(b"\0" * 4096)
    (workspace / "link.data").symlink_to(workspace.parent / "outside.data")
    (workspace / "bad.onnx").write_bytes(damage(small_net()))
    extra = () if command == "optimize" else ("--dry-run",)
    refused(workspace.parent, ("optimize", "bad.onnx", *extra), "bad.onnx", *said)


@pytest.mark.parametrize("damage", [not_onnx, truncated, nothing_to_map])
def test_inspect_refuses_a_bad_model_too(
    refused: Refused,
    workspace: Path,
    small_net: Callable[[], onnx.ModelProto],
    damage: Callable[[onnx.ModelProto], bytes],
) -> None:
    (workspace / "bad.onnx").write_bytes(damage(small_net()))
    refused(workspace, ("inspect", "bad.onnx"), "bad.onnx")


@pytest.mark.parametrize("name", ["absent.onnx", ".", "/", "", "deep/absent.onnx", "x" * 300 + ".onnx"])
def test_a_model_that_is_no_file_is_refused(refused: Refused, workspace: Path, name: str) -> None:
    stem = name.removesuffix(".onnx")
    refused(workspace, ("optimize", name), stem)
    refused(workspace, ("inspect", name), stem)


def test_a_model_must_be_given(refused: Refused, workspace: Path) -> None:
    refused(workspace, ("optimize",), "no model is given")


def test_a_sparse_or_undated_model_is_one_line(refused: Refused, workspace: Path) -> None:
    model = graph([helper.make_node("NoSuchOperator", ["input"], ["out"], "odd\nname")])
    broken_model(workspace, model)
    refused(workspace, ("optimize", "broken.onnx"), "broken.onnx", "NoSuchOperator")


# ------------------------------------------------------------------------------------------------------------- chips

CHIPS = [
    ("cell_bits = 2", "cell_bits = 2\ncell_bit = 2", ("crossbars.main.cell_bit", "unknown key")),
    ("cell_bits = 2", "cell_bits = 2\ncount = -4", ("crossbars.main.count", "-4")),
    ("dac_bits = 1", 'dac_bits = 1\ncycle_ns = "100 ns"', ("cycle_ns", "100 ns", "no unit")),
    ("dac_bits = 1", "dac_bits = 1\ncycle_us = 0.1", ("cycle_us", "cycle_ns")),
    ("dac_bits = 1", "dac_bits = 0", ("dac_bits",)),
    ('"offset"', '"sign-magnitude"', ("encoding", "sign-magnitude", "twos-complement")),
    ("rows = 32", "rows = 32.5", ("crossbars.main.rows", "32.5")),
    ("schema_version = 1", "schema_version = 1\nx = [", ()),
    ("rows = 32", "rows = 0\ncount = -1", ("crossbars.main.rows", "crossbars.main.count")),
]


@pytest.mark.parametrize(("good", "bad", "said"), CHIPS)
def test_a_bad_chip_file_is_refused(
    refused: Refused, workspace: Path, good: str, bad: str, said: tuple[str, ...]
) -> None:
    text = (workspace / "chip.toml").read_text()
    assert good in text
    (workspace / "bad.toml").write_text(text.replace(good, bad))
    for command in (("optimize", *DATA), ("optimize", "--dry-run"), ("inspect",)):
        refused(workspace, (*command, "model.onnx", "--hw", "bad.toml"), "bad.toml", *said)


def test_every_error_of_a_chip_file_has_a_line_of_its_own(cli: Cli, workspace: Path) -> None:
    text = (workspace / "chip.toml").read_text()
    (workspace / "bad.toml").write_text(text.replace("rows = 32", "rows = 0").replace("dac_bits = 1", "dac_bits = 99"))
    for command in (("optimize", "--dry-run"), ("inspect",)):
        ran = cli(*command, "model.onnx", "--hw", "bad.toml")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.splitlines() == [
            "error: bad.toml: 2 errors in the chip description",
            "error: bad.toml: dac_bits: found 99, allowed a whole number from 1 to 16",
            "error: bad.toml: crossbars.main.rows: found 0, allowed a whole number from 1 to 65536",
        ]


@pytest.mark.parametrize("name", ["absent.toml", "isac", "."])
def test_a_chip_that_is_none_is_refused(refused: Refused, workspace: Path, name: str) -> None:
    refused(workspace, ("optimize", "model.onnx", *DATA, "--hw", name), name)


def test_a_chip_that_is_too_small_is_refused(refused: Refused, workspace: Path) -> None:
    text = (workspace / "chip.toml").read_text()
    (workspace / "one.toml").write_text(text.replace("cell_bits = 2", "cell_bits = 2\ncount = 1"))
    run = ("optimize", "model.onnx", *DATA)
    refused(workspace, (*run, "--hw", "one.toml", "--no-drop"), "small", "2 bits", "larger chip")
    refused(workspace, (*run, "--hw", "one.toml", "--weight-bits", "8"), "small")
    refused(workspace, (*run, "--hw", "chip.toml", "--max-crossbars", "1", "--no-drop"), "1 crossbar is too few")
    (workspace / "narrow.toml").write_text(text.replace("cols = 16", "cols = 1"))
    for bits in ("8", "4-8"):
        refused(workspace, (*run, "--hw", "narrow.toml", "--weight-bits", bits), "conv1", "wider")


# -------------------------------------------------------------------------------------------------------------- data

DATASETS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"picture": np.zeros((8, 3, 8, 8), np.float32)}, ("'picture'", "'input'")),
    ({"input": np.zeros((8, 3, 9, 8), np.float32)}, ("[8, 3, 9, 8]",)),
    ({"input": np.zeros((8, 3, 8), np.float32)}, ("[8, 3, 8]",)),
    ({"input": np.zeros((8, 3, 8, 8), np.float64)}, ("float64", "float32")),
    ({"input": np.zeros((8, 3, 8, 8), np.uint8)}, ("uint8", "float32")),
    ({"input": np.full((8, 3, 8, 8), np.nan, np.float32)}, ("NaN",)),
    ({"input": np.zeros((0, 3, 8, 8), np.float32)}, ("empty",)),
    ({"input": np.zeros((8, 3, 8, 8), np.float32), "labels": np.zeros(7, int)}, ("7 labels",)),
    ({"input": np.zeros((8, 3, 8, 8), np.float32), "labels": np.zeros(8)}, ("labels", "integers")),
    ({"input": np.zeros((8, 3, 8, 8), np.float32), "extra": np.zeros(8)}, ("'extra'",)),
    ({"labels": np.zeros(8, int)}, ("'input'",)),
]


@pytest.mark.parametrize(("arrays", "said"), DATASETS)
@pytest.mark.parametrize("option", ["--calibration", "--selection", "--eval"])
def test_bad_data_is_refused(
    refused: Refused, workspace: Path, arrays: dict[str, Any], said: tuple[str, ...], option: str
) -> None:
    np.savez(workspace / "bad.npz", **arrays)
    refused(workspace, ("optimize", "model.onnx", *DATA, option, "bad.npz"), "bad.npz", *said)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.npz", b"PK\x03\x04 no archive"),
        ("bad.npz", b""),
        ("bad.npy", b"\x93NUMPY\x01\x00"),
        ("bad.csv", b"1,2\n"),
        ("bad.py", b"def feeds():\n    return []\n"),
    ],
)
def test_data_of_no_known_kind_is_refused(refused: Refused, workspace: Path, name: str, content: bytes) -> None:
    (workspace / name).write_bytes(content)
    refused(workspace, ("optimize", "model.onnx", "--calibration", name), name)
    refused(workspace, ("optimize", "model.onnx", "--calibration", "absent.npz"), "absent.npz")
    (workspace / "no-pictures").mkdir()
    refused(workspace, ("optimize", "model.onnx", "--calibration", "no-pictures"), "no-pictures")


@pytest.mark.parametrize(
    "body",
    ["raise RuntimeError('two\\nlines')", "return [{'wrong': 1}]", "return []", "return 3", "import absent_module"],
)
def test_a_data_function_that_fails_is_refused(refused: Refused, workspace: Path, body: str) -> None:
    (workspace / "feeds.py").write_text(f"def feeds():\n    {body}\n")
    run = ("optimize", "model.onnx", "--calibration", "feeds.py:feeds")
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        refused(workspace, run, "feeds.py")
    finally:
        sys.dont_write_bytecode = before


class Payload:
    """What an attacker pickles: loading it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize("name", ["evil.npz", "evil.npy"])
@pytest.mark.parametrize("option", ["--calibration", "--eval"])
def test_pickled_arrays_are_never_loaded(refused: Refused, workspace: Path, name: str, option: str) -> None:
    array = np.empty(2, object)
    array[:] = [Payload(), Payload()]
    if name.endswith("npz"):
        np.savez(workspace / name, allow_pickle=True, input=array)
    else:
        np.save(workspace / name, array, allow_pickle=True)
    refused(workspace, ("optimize", "model.onnx", *DATA, option, name), name)
    assert not (workspace / "pwned").exists()
    # The payload does work where arrays are unpickled, so that this test could fail.
    pickle.loads(pickle.dumps(Payload()))  # noqa: S301
    assert (workspace / "pwned").exists()
