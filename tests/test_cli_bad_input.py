"""Bad input: exit code 2, one line that names the culprit and the cause, and not a file touched."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, Any]]

DATA = ("--calibration", "calibration.npz", "--selection", "selection.npz", "--evaluations", "1")


def refused(cli: Cli, snapshot: Snapshot, folder: Path, arguments: tuple[object, ...], *said: str) -> str:
    """Run a command that must be refused, and check everything that a refusal promises."""
    before = snapshot(folder)
    ran = cli(*arguments)
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in ran.err
    for part in said:
        assert part in lines[0]
    assert snapshot(folder) == before
    return str(lines[0])


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
    cli: Cli,
    snapshot: Snapshot,
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
    refused(cli, snapshot, workspace.parent, ("optimize", "bad.onnx", *extra), "bad.onnx", *said)


@pytest.mark.parametrize("damage", [not_onnx, truncated, nothing_to_map])
def test_inspect_refuses_a_bad_model_too(
    cli: Cli,
    snapshot: Snapshot,
    workspace: Path,
    small_net: Callable[[], onnx.ModelProto],
    damage: Callable[[onnx.ModelProto], bytes],
) -> None:
    (workspace / "bad.onnx").write_bytes(damage(small_net()))
    refused(cli, snapshot, workspace, ("inspect", "bad.onnx"), "bad.onnx")


@pytest.mark.parametrize("name", ["absent.onnx", ".", "/", "", "deep/absent.onnx", "x" * 300 + ".onnx"])
def test_a_model_that_is_no_file_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path, name: str) -> None:
    stem = name.removesuffix(".onnx")
    refused(cli, snapshot, workspace, ("optimize", name), stem)
    refused(cli, snapshot, workspace, ("inspect", name), stem)


def test_a_model_must_be_given(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    refused(cli, snapshot, workspace, ("optimize",), "no model is given")


def test_a_sparse_or_undated_model_is_one_line(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    model = graph([helper.make_node("NoSuchOperator", ["input"], ["out"], "odd\nname")])
    broken_model(workspace, model)
    refused(cli, snapshot, workspace, ("optimize", "broken.onnx"), "broken.onnx", "NoSuchOperator")


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
    cli: Cli, snapshot: Snapshot, workspace: Path, good: str, bad: str, said: tuple[str, ...]
) -> None:
    text = (workspace / "chip.toml").read_text()
    assert good in text
    (workspace / "bad.toml").write_text(text.replace(good, bad))
    for command in (("optimize", *DATA), ("optimize", "--dry-run"), ("inspect",)):
        refused(cli, snapshot, workspace, (*command, "model.onnx", "--hw", "bad.toml"), "bad.toml", *said)


@pytest.mark.parametrize("name", ["absent.toml", "isac", "."])
def test_a_chip_that_is_none_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path, name: str) -> None:
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, "--hw", name), name)


def test_a_chip_that_is_too_small_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    text = (workspace / "chip.toml").read_text()
    (workspace / "one.toml").write_text(text.replace("cell_bits = 2", "cell_bits = 2\ncount = 1"))
    run = ("optimize", "model.onnx", *DATA)
    refused(cli, snapshot, workspace, (*run, "--hw", "one.toml"), "small", "2 bits", "larger chip")
    refused(cli, snapshot, workspace, (*run, "--hw", "one.toml", "--weight-bits", "8"), "small")
    refused(cli, snapshot, workspace, (*run, "--hw", "chip.toml", "--max-crossbars", "1"), "1 crossbars are too few")
    (workspace / "narrow.toml").write_text(text.replace("cols = 16", "cols = 1"))
    for bits in ("8", "4-8"):
        refused(cli, snapshot, workspace, (*run, "--hw", "narrow.toml", "--weight-bits", bits), "conv1", "wider")


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
    cli: Cli, snapshot: Snapshot, workspace: Path, arrays: dict[str, Any], said: tuple[str, ...], option: str
) -> None:
    np.savez(workspace / "bad.npz", **arrays)
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, option, "bad.npz"), "bad.npz", *said)


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
def test_data_of_no_known_kind_is_refused(
    cli: Cli, snapshot: Snapshot, workspace: Path, name: str, content: bytes
) -> None:
    (workspace / name).write_bytes(content)
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", "--calibration", name), name)
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", "--calibration", "absent.npz"), "absent.npz")
    (workspace / "no-pictures").mkdir()
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", "--calibration", "no-pictures"), "no-pictures")


@pytest.mark.parametrize(
    "body",
    ["raise RuntimeError('two\\nlines')", "return [{'wrong': 1}]", "return []", "return 3", "import absent_module"],
)
def test_a_data_function_that_fails_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path, body: str) -> None:
    (workspace / "feeds.py").write_text(f"def feeds():\n    {body}\n")
    run = ("optimize", "model.onnx", "--calibration", "feeds.py:feeds")
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        refused(cli, snapshot, workspace, run, "feeds.py")
    finally:
        sys.dont_write_bytecode = before


class Payload:
    """What an attacker pickles: loading it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize("name", ["evil.npz", "evil.npy"])
@pytest.mark.parametrize("option", ["--calibration", "--eval"])
def test_pickled_arrays_are_never_loaded(cli: Cli, snapshot: Snapshot, workspace: Path, name: str, option: str) -> None:
    array = np.empty(2, object)
    array[:] = [Payload(), Payload()]
    if name.endswith("npz"):
        np.savez(workspace / name, allow_pickle=True, input=array)
    else:
        np.save(workspace / name, array, allow_pickle=True)
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, option, name), name)
    assert not (workspace / "pwned").exists()
    # The payload does work where arrays are unpickled, so that this test could fail.
    pickle.loads(pickle.dumps(Payload()))  # noqa: S301
    assert (workspace / "pwned").exists()


# ------------------------------------------------------------------------------------------------------------ output


def test_an_output_that_exists_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    (workspace / "out").mkdir()
    (workspace / "out" / "notes.txt").write_text("mine")
    for extra in ((), ("--dry-run",)):
        run = ("optimize", "model.onnx", *DATA, "-o", "out", *extra)
        refused(cli, snapshot, workspace, run, "out", "exists", "--force")
    (workspace / "model-raqu").write_text("a file")
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, "--force"), "model-raqu", "is a file")
    run = ("optimize", "model.onnx", *DATA, "--force", "-o", ".")
    refused(cli, snapshot, workspace, run, "would replace the model model.onnx")


def test_a_folder_that_cannot_be_written_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, "-o", "/proc/raqu"), "/proc/raqu", "cannot")


def test_a_read_only_folder_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path) -> None:
    out = workspace / "out"
    out.mkdir()
    # Permission bits do not bind root, the immutable flag does.
    if os.geteuid() == 0:
        if subprocess.run(["chattr", "+i", str(out)], capture_output=True, check=False).returncode:  # noqa: S607
            pytest.skip("this file system knows no immutable folders")
    else:
        out.chmod(0o555)
    try:
        refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, "-o", "out"), "out", "writ")
        refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, "-o", "out/deep"), "out/deep", "writ")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", str(out)], check=True)  # noqa: S607
        else:
            out.chmod(0o755)


@pytest.mark.parametrize("victim", ["model.onnx", "manifest.json", "cells.npz", "report.json"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_all_as_it_was(
    cli: Cli, snapshot: Snapshot, workspace: Path, monkeypatch: pytest.MonkeyPatch, victim: str, exists: bool
) -> None:
    run = ("optimize", "model.onnx", *DATA, "--weight-bits", "8", "--cells", "-o", "out", "--force")
    if exists:
        assert cli(*run).code == 0
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_open = Path.open

    def guarded(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if victim in self.name and set(mode) & set("wxa+"):
            raise full
        return real_open(self, mode, *args, **options)

    # Path.write_text and Path.write_bytes go through io.open or Path.open, depending on the version of Python.
    monkeypatch.setattr(Path, "open", guarded)
    if victim == "cells.npz":
        monkeypatch.setattr("zipfile.ZipFile.writestr", lambda *_: (_ for _ in ()).throw(full))
    for name in ("write_text", "write_bytes"):
        real = getattr(Path, name)

        def write(self: Path, *args: Any, _real: Any = real, **options: Any) -> Any:
            if victim in self.name:
                raise full
            return _real(self, *args, **options)

        monkeypatch.setattr(Path, name, write)
    refused(cli, snapshot, workspace, run, "error: out", "No space left on device")


# ------------------------------------------------------------------------------------------------- options, settings

OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--frobnicate",), ("--frobnicate",)),
    (("--seed", "one"), ("--seed", "one")),
    (("--seed", "-1"), ("--seed",)),
    (("--seed", str(2**40)), ("--seed",)),
    (("--format", "xml"), ("--format", "xml", "json")),
    (("--weight-method", "magic"), ("--weight-method", "magic", "gptq")),
    (("--weight-bits", "9"), ("--weight-bits", "9", "2 to 8")),
    (("--weight-bits", "8-2"), ("--weight-bits", "8-2")),
    (("--weight-bits", "float"), ("--weight-bits", "float")),
    (("--activation-bits", "1"), ("--activation-bits", "1")),
    (("--max-crossbars", "0"), ("--max-crossbars", "0")),
    (("--max-crossbars", "4.5"), ("--max-crossbars", "4.5")),
    (("--max-accuracy-drop", "-1"), ("--max-accuracy-drop",)),
    (("--max-accuracy-drop", "nan"), ("--max-accuracy-drop",)),
    (("--threads", "0"), ("--threads",)),
    (("--batch-size", "0"), ("--batch-size",)),
    (("--picture-size", "8"), ("--picture-size",)),
    (("--picture-size", "axb"), ("--picture-size", "axb")),
    (("--picture-std", "0"), ("--picture-std",)),
    (("-q", "-v"), ("-v", "-q")),
    (("--passes", ""), ("--passes",)),
    (("--passes", "tidy,,check"), ("--passes", ",check")),
    (("--passes", "tidy{"), ("--passes", "tidy{")),
    (("--passes", "Tidy"), ("--passes", "Tidy")),
    (("--passes", "polish"), ("--passes", "polish", "annotate-tiling")),
    (("--passes", "tidy{speed=9}"), ("--passes", "speed", "minimum_opset")),
    (("--passes", "tidy{minimum_opset}"), ("--passes", "minimum_opset")),
    (("--passes", "tidy{minimum_opset=high}"), ("--passes", "minimum_opset", "high")),
    (("--passes", "tidy,calibrate"), ("calibrate", "run the pass annotate-tiling first")),
    (("--passes", "tidy,annotate-tiling,quantize-weights"), ("quantize-weights", "run the pass calibrate first")),
    (("--passes", "insert-qdq"), ("insert-qdq", "run the pass annotate-tiling first")),
    (("--passes", "tidy,annotate-tiling,insert-qdq"), ("insert-qdq", "run the pass quantize-weights first")),
    (("--skip", "insert-qdq"), ("write-manifest", "run the pass insert-qdq first")),
    (("--skip", "place-crossbars"), ("write-manifest", "run the pass place-crossbars first")),
    (("--skip", "polish"), ("--skip", "polish", "tidy")),
    (("--dump-after", "polish"), ("--dump-after", "polish", "tidy")),
    (("--skip", "check", "--dump-after", "check"), ("--dump-after", "check")),
    (("--passes", "check"), ("check", "run the pass write-manifest first")),
]


@pytest.mark.parametrize(("arguments", "said"), OPTIONS)
def test_a_bad_option_is_refused(
    cli: Cli, snapshot: Snapshot, workspace: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", *DATA, *arguments), *said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optimise", "model.onnx"), "optimise"),
        (("inspect",), "MODEL.onnx"),
        (("inspect", "model.onnx", "--weight-bits", "1"), "--weight-bits"),
        (("inspect", "model.onnx", "--weight-bits", "2-8"), "--weight-bits"),
        (("hw",), "ACTION"),
        (("hw", "show", "isac"), "isac"),
        (("validate", "absent"), "absent"),
        (("manifest", "show", "absent"), "absent"),
        (("demo", "--model", "alexnet"), "alexnet"),
        (("optimize", "model.onnx", "--config", "absent.toml"), "absent.toml"),
    ],
)
def test_a_bad_command_is_refused(
    cli: Cli, snapshot: Snapshot, workspace: Path, arguments: tuple[str, ...], said: str
) -> None:
    refused(cli, snapshot, workspace, arguments, said)


@pytest.mark.parametrize("text", ["sede = 1", 'seed = "1"', "no toml", "weight_bits = 1"])
def test_a_bad_configuration_is_refused(cli: Cli, snapshot: Snapshot, workspace: Path, text: str) -> None:
    (workspace / "run.toml").write_text(text)
    refused(cli, snapshot, workspace, ("optimize", "model.onnx", "--config", "run.toml"), "run.toml")


# -------------------------------------------------------------------------------------------- as users really run it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optimize", "bad.onnx"), "bad.onnx"),
        (("optimize", "model.onnx", "--hw", "bad.toml"), "bad.toml"),
        (("optimize", "model.onnx", "--frobnicate"), "--frobnicate"),
    ],
)
def test_a_real_process_says_the_same(
    snapshot: Snapshot, workspace: Path, arguments: tuple[str, ...], said: str
) -> None:
    (workspace / "bad.onnx").write_bytes(b"nothing")
    (workspace / "bad.toml").write_text("x = 1")
    before = snapshot(workspace)
    command = [sys.executable, "-m", "raqu_onnx", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: ")
    assert said in ran.stderr
    assert snapshot(workspace) == before


def test_a_full_disk_behind_stdout_is_one_line(workspace: Path) -> None:
    command = [sys.executable, "-m", "raqu_onnx", "hw", "list", "--format", "json"]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=workspace)
    assert ran.returncode == 2
    assert ran.stderr == "error: output: No space left on device\n"
