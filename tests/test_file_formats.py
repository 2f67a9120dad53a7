"""What is published of report.json and cells.npz is what is written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raqu_onnx.cells_format import ARRAY_NAME
from raqu_onnx.json_values import finite
from raqu_onnx.manifest import read_manifest
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.report import FiguresReport, Report, ScoreReport, report_schema
from raqu_onnx.results import Figures
from raqu_onnx.scoring import Score

Cli = Callable[..., Any]

RUN = (
    "optimize", "model.onnx", "--calibration", "calibration.npz", "--selection", "selection.npz", "--eval", "eval.npz",
    "--hw", "chip.toml", "--evaluations", "1", "-q", "-o", "out",
)  # fmt: skip


def test_the_report_is_what_its_schema_says(cli: Cli, workspace: Path) -> None:
    assert cli(*RUN).code == 0
    text = (workspace / "out" / "report.json").read_text()
    report = Report.model_validate_json(text)
    assert report.model_dump(mode="json") == json.loads(text)
    assert report.data["evaluation"] is not None
    assert report.data["evaluation"].model_dump() == {
        "name": "eval.npz", "samples": 40, "labels": True, "synthetic": False, "fitted": False,
    }  # fmt: skip
    assert report.nodes == ["conv1", "conv2", "fc"]
    assert set(report.bits) == set(report.nodes)
    assert all(len(item.weights) == len(report.nodes) for item in report.front)
    broken = json.loads(text)
    broken["figures"][0]["crossbar"] = 3
    with pytest.raises(ValidationError):
        Report.model_validate(broken)


def test_every_key_of_the_report_is_described() -> None:
    schema = report_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    obvious = {"crossbars", "name", "op_type", "reason", "kept", "unmapped"}
    tables = {"Report": schema, **schema["$defs"]}
    silent = [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, value in table["properties"].items()
        if "description" not in value and key not in obvious
    ]
    assert silent == []


@pytest.mark.parametrize(("written", "described"), [(Score, ScoreReport), (Figures, FiguresReport)])
def test_nothing_is_left_out_of_the_report(written: Any, described: Any) -> None:
    assert [item.name for item in dataclasses.fields(written)] == list(described.model_fields)


@pytest.mark.parametrize("file", ["manifest", "report", "cells"])
def test_schemas_are_printed(cli: Cli, file: str) -> None:
    ran = cli("manifest", "schema", file)
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["title"]
    if file == "report":
        assert found == report_schema()


ENCODINGS = {
    "offset": ("", "offset"),
    "unit-column": ('offset_sum = "unit-column"', "offset"),
    "column": ("", "differential-column"),
    "pair": ('polarity_arrays = "pair"', "differential-column"),
    "row": ("", "differential-row"),
    "twos-complement": ("", "twos-complement"),
}


@pytest.mark.parametrize("kind", list(ENCODINGS))
def test_cells_are_what_their_description_says(cli: Cli, workspace: Path, kind: str) -> None:
    """Arrays by name, type and shape; and codes read back by the description's rule alone, without the library."""
    extra, encoding = ENCODINGS[kind]
    text = (workspace / "chip.toml").read_text().replace('encoding = "offset"', f'encoding = "{encoding}"\n{extra}')
    (workspace / "chip.toml").write_text(text)
    assert cli(*RUN, "--weight-bits", "5", "--cells").code == 0
    manifest = read_manifest(workspace / "out" / "manifest.json")
    chip, view = manifest.chip, ManifestView(manifest)
    with np.load(workspace / "out" / "cells.npz") as cells:
        arrays = dict(cells)
    named = {f"{chip.crossbars[p.type].name}/{p.crossbar:06d}" for node in manifest.nodes for p in node.placements}
    assert set(arrays) == named
    for name, levels in arrays.items():
        assert re.fullmatch(ARRAY_NAME, name)
        assert levels.dtype == np.uint8
        assert levels.shape == (32, 16)
        assert levels.max() < 4
    node = next(node for node in manifest.nodes if node.name == "conv2")
    codes = view.node(node).layout.to_matrices(codes_of(workspace / "out" / "model.onnx", node.weight))
    (width,) = (item for item in manifest.encodings[0].widths if item.bits == 5)
    placements = [p for p in node.placements if p.group == 0]
    row, kernel = placements[0].weight_rows[0] + 1, placements[0].kernels[0]
    total = -width.offset
    for part in width.slices:
        (place,) = (
            p
            for p in placements
            if p.weight_rows[0] <= row < p.weight_rows[1]
            and p.kernels[0] <= kernel < p.kernels[1]
            and p.polarity in (None, part.polarity)
        )
        wordline = place.rows[0] + (row - place.weight_rows[0]) * manifest.encodings[0].rows_per_weight + part.row
        bitline = place.cols[0] + (kernel - place.kernels[0]) * width.columns + part.column
        total += part.sign * 2**part.shift * int(arrays[f"main/{place.crossbar:06d}"][wordline, bitline])
    assert total == codes[0, row, kernel]
    for place in placements:
        if place.unit_column is not None:
            assert (arrays[f"main/{place.crossbar:06d}"][slice(*place.rows), place.unit_column] == 1).all()
    assert any(p.unit_column is not None for p in placements) is (kind == "unit-column")


def codes_of(path: Path, name: str) -> np.ndarray:
    import onnx
    from onnx import numpy_helper

    (tensor,) = (item for item in onnx.load(path).graph.initializer if item.name == name)
    return numpy_helper.to_array(tensor)


def test_no_infinity_is_left() -> None:
    assert finite({"a": (1, float("inf")), "b": [float("nan"), {"c": -float("inf")}], "d": "inf"}) == {
        "a": [1, None], "b": [None, {"c": None}], "d": "inf",
    }  # fmt: skip
