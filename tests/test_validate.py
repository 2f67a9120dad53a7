"""Output folders that a stranger re-reads: sound ones pass, and every number counts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from result_folders import (
    ISAAC,
    PAIRS,
    FloatModel,
    Json,
    bump,
    edit,
    failed,
    failed_checks,
    float_model,
    picture_net,
    put,
    small_chip,
    write_folder,
)

from raqu_onnx.cli import main
from raqu_onnx.errors import DataError, ManifestError, ModelError
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.manifest import read_manifest
from raqu_onnx.manifest_build import encoding_entry
from raqu_onnx.model_io import load_model
from raqu_onnx.tiling import ArrayGeometry
from raqu_onnx.validate_phases import FolderChecks
from raqu_onnx.validate_report import Checklist, ValidationReport
from raqu_onnx.validation import validate


def sequence_net() -> onnx.ModelProto:
    """One- and three-dimensional windows, a transposed Gemm and a constant on the left."""
    m = FloatModel([], {})
    y = m.add("Conv", "x", (6, 4, 3), bias=6, pads=[2, 2], dilations=[2])
    m.weights["left_w"] = np.zeros((5, 6), np.float32)
    m.nodes.append(helper.make_node("MatMul", ["left_w", y], ["left_y"], name="left"))
    m.weights["shape"] = np.array([0, 1, 5, 2, 2, 2], np.int64)
    m.nodes.append(helper.make_node("Reshape", ["left_y", "shape"], ["cube5"], name="reshape", allowzero=0))
    m.weights["shape5"] = np.array([-1, 5, 2, 2, 2], np.int64)
    m.nodes.append(helper.make_node("Reshape", ["cube5", "shape5"], ["cube"], name="reshape5"))
    y = m.add("Conv", "cube", (3, 5, 2, 1, 2))
    m.weights["flat"] = np.array([0, -1], np.int64)
    m.nodes.append(helper.make_node("Reshape", [y, "flat"], ["flat_y"], name="reshape2"))
    m.nodes.append(helper.make_node("Transpose", ["flat_y"], ["flat_t"], name="turn"))
    out = m.add("Gemm", "flat_t", (6, 4), bias=4, transA=1)
    return float_model(m, [2, 4, 8], [out])


# ------------------------------------------------------------------------------------------------------ sound folders

CHIPS: dict[str, Json] = {
    "offset": {"encoding": "offset"},
    "offset, unit column": {"encoding": "offset", "offset_sum": "unit-column", "sharing": "diagonal"},
    "isaac": {"encoding": "offset", "offset_sum": "unit-column", "flip": True, "sharing": "exclusive"},
    "flip, digital sum": {"encoding": "offset", "flip": True, "split_slices": True, "cell_bits": 3},
    "differential-column": {"encoding": "differential-column", "cell_bits": 4},
    "differential-column, pairs": {"encoding": "differential-column", "polarity_arrays": "pair"},
    "pairs, split": {"encoding": "differential-column", "polarity_arrays": "pair", "split_slices": True, "cols": 5},
    "differential-row": {"encoding": "differential-row", "sharing": "diagonal", "cell_bits": 1},
    "twos-complement": {"encoding": "twos-complement", "split_slices": True, "sharing": "exclusive"},
    "single bits": {"encoding": "twos-complement", "cell_bits": 1},
}


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("net", [picture_net, sequence_net])
def test_sound_folder_passes(name: str, net: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    write_folder(tmp_path, small_chip(**CHIPS[name]), source=net(), cells=net is picture_net)
    report = validate(tmp_path, threads=1)
    assert report.failures == ()
    assert all(check.passed for check in report.checks)
    assert {"cells.mvm", "cells.codes", "run.levels-agree"} <= {check.name for check in report.checks}


def chip_of_sizes(*types: tuple[int, int, int], **more: Any) -> Chip:
    """A chip with crossbars of so many rows, columns and bits per cell."""
    kinds = tuple(
        CrossbarType(name=f"t{n}", rows=rows, cols=cols, cell_bits=bits, count=60)
        for n, (rows, cols, bits) in enumerate(types)
    )
    values: Json = {"schema_version": 1, "name": "test", "encoding": "offset", "sharing": "time", "dac_bits": 1}
    return Chip(**{**values, **more}, crossbars=kinds)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sharing": "exclusive", "split_slices": True},
        {"sharing": "diagonal", "offset_sum": "unit-column"},
        {"encoding": "differential-row"},
        {"encoding": "differential-column", "polarity_arrays": "pair", "sharing": "exclusive"},
    ],
)
def test_nodes_on_several_crossbar_types_pass(more: Json, tmp_path: Path) -> None:
    write_folder(tmp_path, chip_of_sizes((16, 16, 2), (64, 64, 2), (30, 11, 2), **more))
    manifest = read_manifest(tmp_path / "manifest.json")
    assert max(len({placement.type for placement in node.placements}) for node in manifest.nodes) > 1
    assert validate(tmp_path, threads=1).failures == ()


def test_types_with_cells_of_different_bits_pass(tmp_path: Path) -> None:
    write_folder(tmp_path, chip_of_sizes((16, 16, 2), (64, 64, 1), (30, 11, 3)))
    assert validate(tmp_path, threads=1).failures == ()


def test_a_node_on_cells_of_different_bits_is_found(tmp_path: Path) -> None:
    """Its columns would mean something else on each type."""
    chip = chip_of_sizes((16, 16, 2), (16, 16, 4), sharing="exclusive")
    write_folder(tmp_path, chip)

    def spread(data: Json) -> None:
        used = next(node for node in data["nodes"] if len(node["placements"]) > 1)
        kind = used["placements"][0]["type"]
        used["placements"][0]["type"] = 1 - kind
        other = ArrayGeometry.of(chip, chip.crossbars[1 - kind])
        widths = sorted({bits for bits, _ in used["bits"] if bits})
        data["encodings"].append(encoding_entry(1 - kind, other, widths).model_dump(mode="json"))

    edit(tmp_path / "manifest.json", spread)
    checklist = Checklist()
    FolderChecks(tmp_path, checklist).run(load_model(tmp_path / "model.onnx", check_weights=False))
    details = " ".join(check.detail for check in ValidationReport(tuple(checklist.checks)).failures)
    assert "lies on crossbar types whose cells hold [2, 4] bits" in details


def test_node_without_any_kernel_passes(tmp_path: Path) -> None:
    write_folder(tmp_path, small_chip("offset"), widths=(0,))
    assert validate(tmp_path, threads=1).failures == ()
    assert read_manifest(tmp_path / "manifest.json").totals.placements == 0


# ----------------------------------------------------------------------------------------- any number, with and without


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers in JSON values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


# Facts that nothing else in the files depends on: only the digest protects them.
FREE = {"seed", "configuration", "calibration", "selection", "tool"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_number_is_caught(data: st.DataObject, sound: dict[str, Path], tmp_path: Path) -> None:
    source = sound[data.draw(st.sampled_from([ISAAC, PAIRS]))]
    content = json.loads((source / "manifest.json").read_text())
    path = data.draw(st.sampled_from(sorted(numbers(content), key=str)))
    amount = data.draw(st.sampled_from([1, -1, 2, 64, 0.125, -0.125, 2**40]))
    for seal in (False, True):
        (tmp_path / "manifest.json").write_bytes((source / "manifest.json").read_bytes())
        for name in ("model.onnx", "cells.npz"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(source / name)
        edit(tmp_path / "manifest.json", bump(*path, by=amount), seal=seal)
        found = failed_checks(tmp_path)
        if not seal:
            assert found & {"manifest.digest", "manifest.schema"}
        elif path[0] not in FREE and path[:2] != ("chip", "dac_bits"):
            assert found, f"{path} changed by {amount}"


# ---------------------------------------------------------------------------------------------------- data and errors


def test_scores_with_labels_and_reference(folder: Callable[[str], Path]) -> None:
    out = folder(ISAAC)
    feeds = {"x": np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32), "labels": np.zeros(6, int)}
    # Several outputs could be class scores: none is taken, unless the run that wrote the folder said so.
    several = validate(out, feeds, reference=out / "float.onnx", threads=1)
    assert several.passed
    assert all(score.top1 is None and score.sqnr_db is not None for score in several.scores.values())
    edit(out / "manifest.json", put("configuration", "task", value="classification"))
    report = validate(out, feeds, reference=out / "float.onnx", threads=1)
    assert report.passed
    assert set(report.scores) == {"enable-all", "disable-all"}
    assert all(
        score.samples == 6 and score.top1 is not None and score.kl is not None for score in report.scores.values()
    )
    assert "reference.sha256" in failed(validate(out, feeds, reference=out / "model.onnx", threads=1))


def test_missing_and_unreadable_files_raise(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nowhere"):
        validate(tmp_path / "nowhere")
    out = folder(ISAAC)
    with pytest.raises(DataError, match="wrong"):
        validate(out, {"wrong": np.zeros((2, 3, 8, 8), np.float32)})
    (out / "cells.npz").write_bytes(b"not a zip file")
    with pytest.raises(ManifestError, match=r"cells\.npz"):
        validate(out)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ManifestError, match=r"manifest\.json: is not JSON"):
        validate(out)
    (out / "manifest.json").write_text(text)
    model = (out / "model.onnx").read_bytes()
    for damaged in (b"\x08", b"", model[: len(model) // 2]):
        (out / "model.onnx").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.onnx: was changed or damaged .*: model\.sha256 in .* \(is .*\)$"):
            validate(out)
    # Without a digest to compare with, the reader's word is all there is.
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.onnx: is .*cut short"):
        validate(out)
    (out / "model.onnx").unlink()
    with pytest.raises(ManifestError, match=r"model\.onnx: is missing"):
        validate(out)


def test_saturated_outputs_are_told_apart(folder: Callable[[str], Path], monkeypatch: Any) -> None:
    """Levels that disagree by more than rounding fail."""
    import raqu_onnx.validate_runs as module

    original = module.run_feeds  # type: ignore[attr-defined]

    # Every batch runs at one level, then at the other.
    factors = itertools.cycle((1, 2))

    def run_feeds(*arguments: Any) -> Any:
        factor = next(factors)
        return [factor * array for array in original(*arguments)]

    monkeypatch.setattr(module, "run_feeds", run_feeds)
    assert failed(validate(folder(ISAAC), threads=1)) == {"run.levels-agree"}


def test_outputs_that_are_not_finite_fail(folder: Callable[[str], Path]) -> None:
    out = folder(ISAAC)
    report = validate(out, {"x": np.zeros((2, 3, 8, 8), np.float32)}, threads=1)
    assert report.passed
    model = onnx.load(str(out / "model.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.inf, np.float32), "huge"))
    last = next(node for node in model.graph.node if node.name == "turn")
    model.graph.node.append(helper.make_node("Mul", [last.input[0], "huge"], ["large"], name="mul"))
    model.graph.output.append(helper.make_tensor_value_info("large", TensorProto.FLOAT, None))
    onnx.save(model, str(out / "model.onnx"))
    assert {"run.enable-all", "run.disable-all"} <= failed(validate(out, threads=1))


def test_command_line(folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = folder(ISAAC)
    assert main(["validate", str(out), "--threads", "1"]) == 0
    assert "checks passed" in capsys.readouterr().out
    assert main(["validate", str(out), "-q"]) == 0
    assert capsys.readouterr().out == ""
    np.savez(tmp_path / "eval.npz", x=np.ones((4, 3, 8, 8), np.float32), labels=np.arange(4))
    assert main(["validate", str(out), "--data", str(tmp_path / "eval.npz"), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["scores"]["enable-all"]["samples"] == 4
    assert main(["manifest", "show", str(out)]) == 0
    assert "lower bound" in capsys.readouterr().out
    assert main(["manifest", "show", str(out / "manifest.json"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["placements"] > 0

    edit(out / "manifest.json", bump("totals", "lower_bound"), seal=False)
    assert main(["validate", str(out), "-q"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL manifest.digest") for line in printed)
    assert any("totals.lower_bound" in line for line in printed)
    assert main(["manifest", "show", str(out)]) == 2
    assert main(["validate", str(out / "nothing")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert all(line.startswith("error: ") for line in err)
