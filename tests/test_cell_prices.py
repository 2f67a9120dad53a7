"""Chips whose crossbar types have cells of different bits: what weights cost, which widths are worth trying."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.config import OptimizeConfig
from raqu_onnx.encodings import Encoding
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.manifest import read_manifest
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.optimization import optimize
from raqu_onnx.search.allocation import kernel_widths
from raqu_onnx.search.cell_prices import cell_shares, cells_by_width, cells_within, mean_cells
from raqu_onnx.validation import validate

ONE, TWO = Encoding("offset", 1), Encoding("offset", 2)


def mixed(counts: tuple[int | None, int | None], *, bits: tuple[int, int] = (1, 2), size: int = 16) -> Chip:
    """A chip with two types that differ in the bits of a cell only."""
    kinds = tuple(
        CrossbarType(name=f"{name}{cell_bits}", rows=size, cols=size, cell_bits=cell_bits, count=count)
        for name, cell_bits, count in zip("ab", bits, counts, strict=True)
    )
    return Chip(schema_version=1, name="mixed", encoding="offset", sharing="time", dac_bits=1, crossbars=kinds)


def widths_on(chip: Chip, cost: list[float], low: int = 2, high: int = 8) -> list[int]:
    limits = SimpleNamespace(weight_limits=lambda _: (low, high))
    problem = SimpleNamespace(chip=chip, cell_cost=np.array([cost]), settings=limits)
    return kernel_widths(problem)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [(1, 2), (2, 1)])
def test_every_width_that_saves_columns_somewhere_is_tried(bits: tuple[int, int]) -> None:
    assert widths_on(mixed((4, 4), bits=bits), [1.0] * 9) == [2, 3, 4, 5, 6, 7, 8]
    assert widths_on(mixed((4, 4), bits=(2, 2)), [1.0] * 9) == [2, 4, 6, 8]
    assert widths_on(mixed((4, 4), bits=(2, 4)), [1.0] * 9) == [2, 4, 6, 8]


def test_kernels_wider_than_every_crossbar_are_no_choice() -> None:
    cost = [np.inf, np.inf, 1, 1, 2, 2, np.inf, np.inf, np.inf]
    assert widths_on(mixed((4, 4), bits=(2, 2)), cost) == [2, 4, 5]
    assert widths_on(mixed((4, 4), bits=(2, 2)), cost, high=4) == [2, 4]


def test_cells_count_by_what_the_chip_has() -> None:
    assert cell_shares(mixed((30, 10))) == {ONE: 0.75, TWO: 0.25}
    assert mean_cells(cell_shares(mixed((30, 10))))[3:5].tolist() == [0.75 * 3 + 0.25 * 2, 0.75 * 4 + 0.25 * 2]
    # Whatever there is any number of; of two such types the one on which every weight takes fewer cells.
    assert cell_shares(mixed((None, 10))) == {ONE: 1.0}
    assert cell_shares(mixed((None, None))) == cell_shares(mixed((7, None))) == {TWO: 1.0}


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_mean_lies_between_the_types_and_rises_with_the_width(one: int, two: int) -> None:
    mean = mean_cells(cell_shares(mixed((one, two))))
    assert (mean <= cells_by_width(ONE)).all()
    assert (mean >= cells_by_width(TWO)).all()
    # Each bit is worth a cell of the first type, so that no width costs what a wider one does.
    assert (np.diff(mean[2:]) > 0).all()


def bits_by_cells(out: Path) -> dict[int, list[int]]:
    """Kernels' bits by the bits of the cells that their node lies on."""
    manifest = read_manifest(out / "manifest.json")
    view = ManifestView(manifest)
    found: dict[int, list[int]] = {}
    for node in manifest.nodes:
        kinds = {manifest.chip.crossbars[placement.type].cell_bits for placement in node.placements}
        for cell_bits in kinds:
            found.setdefault(cell_bits, []).extend(view.nodes[node.name].channel_bits.tolist())
    return found


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_nodes_get_the_widths_of_the_cells_that_they_lie_on(
    tmp_path: Path, small_net: Any, small_data: Any, order: tuple[int, int]
) -> None:
    counts = (40, 2) if order == (1, 2) else (2, 40)
    config = OptimizeConfig(evaluations=0, sensitivity_samples=16, max_crossbars=24, drop=False)
    optimize(small_net(), tmp_path, calibration=small_data(48), chip=mixed(counts, bits=order), config=config)
    assert validate(tmp_path).passed
    found = bits_by_cells(tmp_path)
    # In cells of 1 bit a kernel of 3 or 5 bits takes fewer columns than one of 4 or 6.
    assert any(bits % 2 for bits in found[1]), found


def test_a_run_leaves_out_widths_that_no_crossbar_takes(tmp_path: Path, small_net: Any, small_data: Any) -> None:
    """Crossbars of 5 columns with cells of 1 bit hold no kernel of 6 bits."""
    chip = mixed((None, None), bits=(1, 1))
    narrow = tuple(kind.model_copy(update={"cols": 5}) for kind in chip.crossbars)
    config = OptimizeConfig(evaluations=1, sensitivity_samples=16, max_crossbars=100)
    optimize(
        small_net(),
        tmp_path,
        calibration=small_data(48),
        chip=chip.model_copy(update={"crossbars": narrow}),
        config=config,
    )
    assert max(max(bits) for bits in bits_by_cells(tmp_path).values()) <= 5


@pytest.mark.parametrize(
    ("crossbars", "cells"), [(0, 0), (1, 1024), (3, 3 * 1024), (4, 3 * 1024 + 256), (9, 3 * 1024 + 512)]
)
def test_the_largest_crossbars_are_counted_first_as_far_as_there_are_any(crossbars: int, cells: int) -> None:
    kinds = tuple(
        CrossbarType(name=f"{size}", rows=size, cols=size, cell_bits=2, count=count)
        for size, count in ((16, 2), (32, 3))
    )
    chip = Chip(schema_version=1, name="two", encoding="offset", sharing="time", dac_bits=1, crossbars=kinds)
    assert cells_within(chip, crossbars) == cells
    assert cells_within(mixed((None, 2)), math.inf) == math.inf
