"""Fixtures that several test files share."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.linalg  # noqa: F401 - it has a BLAS of its own, which a limit reaches once it is loaded
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits

from raqu_onnx.cli import main

# Modules of helpers that assert: what is wrong is shown in full, as in the tests themselves.
pytest.register_assert_rewrite(
    "model_files", "onnx_texts", "qdq_models", "result_folders", "segment_models", "sequential_cases"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Products of small matrices are slower in several threads, and sums depend on how many there are."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Searches leave their sensitivities in the user's cache folder, also those of commands that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def reference_models() -> ModuleType:
    """The module tools/reference_models.py, which is no part of the package."""
    path = Path(__file__).parents[1] / "tools" / "reference_models.py"
    spec = importlib.util.spec_from_file_location("reference_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------- a small net to optimize


def small_net(
    batch: int | str = "N", size: int | str = 8, *, depthwise: bool = False, channels: int = 8
) -> onnx.ModelProto:
    """Two convolutions and a linear layer on pictures of 3 channels; 5 classes."""
    rng = np.random.default_rng(0)
    second = (channels, 1 if depthwise else channels, 3, 3)
    weights = {
        "w1": rng.normal(0, 0.3, (channels, 3, 3, 3)),
        "b1": rng.normal(0, 0.1, channels),
        "w2": rng.normal(0, 0.2, second),
        "b2": rng.normal(0, 0.1, channels),
        "w3": rng.normal(0, 0.5, (channels, 5)),
        "b3": rng.normal(0, 0.1, 5),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node(
            "Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4, strides=[2, 2], group=channels // second[1]
        ),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def small_data(samples: int = 48, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs of `small_net`, with what the net itself says on them as labels."""
    import onnxruntime as ort

    inputs = np.random.default_rng(seed).normal(size=(samples, 3, 8, 8)).astype(np.float32)
    session = ort.InferenceSession(small_net().SerializeToString(), providers=["CPUExecutionProvider"])
    return {"input": inputs, "labels": session.run(None, {"input": inputs})[0].argmax(1)}


SMALL_CHIP = """schema_version = 1
name = "small"
encoding = "offset"
sharing = "time"
dac_bits = 1
[[crossbars]]
name = "main"
rows = 32
cols = 16
cell_bits = 2
"""


@pytest.fixture(name="small_net", scope="session")
def _small_net() -> Callable[..., onnx.ModelProto]:
    return small_net


@pytest.fixture(name="small_data", scope="session")
def _small_data() -> Callable[..., dict[str, np.ndarray]]:
    return small_data


@pytest.fixture(scope="session")
def _small_files() -> dict[str, bytes]:
    import io

    files = {"model.onnx": small_net().SerializeToString(), "chip.toml": SMALL_CHIP.encode()}
    for name, samples, seed in (("calibration", 48, 1), ("selection", 48, 2), ("eval", 40, 3)):
        stream = io.BytesIO()
        np.savez(stream, **small_data(samples, seed))
        files[f"{name}.npz"] = stream.getvalue()
    return files


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _small_files: dict[str, bytes]) -> Path:
    """The current folder: a small model, data for calibration, selection and evaluation, and a small chip."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name, content in _small_files.items():
        (folder / name).write_bytes(content)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound result folders by kind, which tests must not change."""
    from result_folders import ISAAC, PAIRS, small_chip, write_folder

    root = tmp_path_factory.mktemp("sound")
    folders = {ISAAC: root / "isaac", PAIRS: root / "pairs"}
    write_folder(folders[ISAAC], small_chip("offset", offset_sum="unit-column", flip=True))
    write_folder(folders[PAIRS], small_chip("differential-column", polarity_arrays="pair"))
    return folders


@pytest.fixture
def folder(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a sound result folder to be damaged."""

    def fresh(kind: str) -> Path:
        return Path(shutil.copytree(sound[kind], tmp_path / "out"))

    return fresh


@dataclass(frozen=True)
class Ran:
    """What a command said."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, Any]]:
    """Everything below a folder: names, kinds, modes and digests."""

    def take(folder: Path) -> dict[str, Any]:
        return {
            str(path.relative_to(folder)): (
                oct(path.lstat().st_mode),
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
            )
            for path in sorted(folder.rglob("*"))
        }

    return take


STAGE = re.compile(r" *\d+\.\d s  ")


@pytest.fixture
def refused(cli: Callable[..., Ran], snapshot: Callable[[Path], dict[str, Any]]) -> Callable[..., str]:
    """Runs a command that must be refused, and checks everything that a refusal promises; gives its one line."""

    def run(folder: Path, arguments: tuple[object, ...], *said: str) -> str:
        before = snapshot(folder)
        ran = cli(*arguments)
        assert ran.code == 2, ran
        assert ran.out == ""
        assert "Traceback" not in ran.err
        # The stages that the run went through may stand before it.
        lines = [line for line in ran.err.splitlines() if not STAGE.match(line)]
        # Only a chip file may have several errors: a summary, then a line for each.
        summary = re.fullmatch(r"error: .*: (\d+) errors in the chip description", lines[0])
        assert len(lines) == (1 + int(summary[1]) if summary else 1), ran.err
        assert all(line.startswith("error: ") for line in lines)
        for part in said:
            assert part in ran.err
        assert snapshot(folder) == before
        return str(lines[0])

    return run
