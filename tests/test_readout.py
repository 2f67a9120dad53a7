"""Bitlines, converters, stuck and varying cells, worked by hand and against plain integer products."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.backend.engines import _pieces, exact_bits
from raqu_onnx.cell_errors import CellErrors, DisturbedCells
from raqu_onnx.cells import ProgrammedCells
from raqu_onnx.converters import Adc, Conversions
from raqu_onnx.errors import ConfigError
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.layout import WeightLayout
from raqu_onnx.manifest import Manifest
from raqu_onnx.manifest_view import ManifestView
from raqu_onnx.readout import NodeReadout


def load(name: str) -> ModuleType:
    """Another test file, for what it builds."""
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"helpers_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load("test_cells.py")


def chip_of(encoding: dict[str, Any], *, cell_bits: int, dac_bits: int, **crossbar: Any) -> Chip:
    kind = {"rows": 40, "cols": 60, **crossbar}
    return Chip(
        schema_version=1,
        name="test",
        dac_bits=dac_bits,
        sharing="time",
        crossbars=(CrossbarType(name="main", cell_bits=cell_bits, **kind),),
        **encoding,
    )


def one_node(codes: list[list[int]], bits: list[int], chip: Chip) -> tuple[Manifest, ProgrammedCells]:
    array = np.array(codes, np.int8)
    node = build.make_node("n", WeightLayout("in-out", array.shape), np.array(bits), array)
    manifest = build.make_manifest([node], chip)
    return manifest, ProgrammedCells(manifest, {"n": array})


def readout(manifest: Manifest, cells: Any, **options: Any) -> NodeReadout:
    return NodeReadout(ManifestView(manifest), manifest.nodes[0], cells, **options)


def vectors(*rows: list[int]) -> np.ndarray:
    return np.array(rows)[:, None, :]


# --------------------------------------------------------------------------------------------------------- converters


def test_converter_rounds_and_clips_in_place() -> None:
    sums = np.array([-1.0, 0.0, 7.0, 7.4, 7.6, 9.0])
    assert Adc(3).convert(sums) == 3
    np.testing.assert_array_equal(sums, [0, 0, 7, 7, 7, 7])
    sums = np.array([-5.0, -4.0, -0.6, 3.0, 4.0])
    assert Adc(3, signed=True).convert(sums) == 2
    np.testing.assert_array_equal(sums, [-4, -4, -1, 3, 3])
    sums = np.array([-5.25, 1e9])
    assert Adc(None).convert(sums) == 0
    np.testing.assert_array_equal(sums, [-5.25, 1e9])


@given(st.integers(-5000, 0), st.integers(0, 5000), st.booleans())
def test_lossless_bits_are_the_fewest(low: int, high: int, signed: bool) -> None:
    low = low if signed else 0
    bits = Adc(None, signed).bits_for(low, high)
    assert Adc(bits, signed).convert(np.array([low, high], float)) == 0
    if bits > 1:
        assert Adc(bits - 1, signed).convert(np.array([low, high], float)) > 0


def test_conversions_add_up() -> None:
    counted = Conversions()
    counted.convert(Adc(2), np.array([1.0, 5.0]))
    counted.convert(Adc(2), np.array([[0.0]]))
    assert counted == Conversions(3, 1, 0.0, 5.0)
    assert counted + Conversions(2, 0, -1.0, 2.0) == Conversions(5, 1, -1.0, 5.0)


# ------------------------------------------------------------------------------------------------------ worked by hand

OFFSET = {"encoding": "offset"}


def test_clipping_by_hand() -> None:
    """Codes 1, 1, -2 of 2 bits are levels 3, 3, 0; inputs 3, 3, 0 make 18, of which 4 bits hold 15; 2 * 6 go off."""
    manifest, cells = one_node([[1], [1], [-2]], [2], chip_of(OFFSET, cell_bits=2, dac_bits=2))
    node = readout(manifest, cells, adc=Adc(4))
    assert node.run(vectors([3, 3, 0])).tolist() == [[[15.0 - 12.0]]]
    # Four slices of 2 bits, one bitline.
    assert (node.conversions.total, node.conversions.clipped) == (4, 1)
    assert node.lossless_bits() == 5
    assert node.seen_bits() == 5
    assert readout(manifest, cells, adc=Adc(5)).run(vectors([3, 3, 0])).tolist() == [[[6.0]]]
    assert readout(manifest, cells).run(vectors([3, 3, 0])).tolist() == [[[6.0]]]


def test_slices_are_clipped_one_by_one() -> None:
    """15 is driven as 3 and 3: each slice makes 18 and is clipped to 15, so 15 * (1 + 4) stays of 90."""
    manifest, cells = one_node([[1], [1]], [2], chip_of(OFFSET, cell_bits=2, dac_bits=2))
    node = readout(manifest, cells, adc=Adc(4))
    assert node.run(vectors([15, 15])).tolist() == [[[15 * 5 - 2 * 30.0]]]
    assert node.conversions.clipped == 2


def test_wordlines_that_take_turns_clip_less() -> None:
    manifest, cells = one_node([[1], [1], [-2]], [2], chip_of(OFFSET, cell_bits=2, dac_bits=2, rows_active=1))
    node = readout(manifest, cells, adc=Adc(4))
    assert node.run(vectors([3, 3, 0])).tolist() == [[[6.0]]]
    assert (node.conversions.total, node.conversions.clipped) == (12, 0)
    assert node.lossless_bits() == 4


def test_signed_bitline_by_hand() -> None:
    """Codes 3 and -3 of 3 bits in pairs of rows: inputs 0, 1 make -3, of which 2 signed bits hold -2."""
    chip = chip_of({"encoding": "differential-row"}, cell_bits=2, dac_bits=1)
    manifest, cells = one_node([[3], [-3]], [3], chip)
    node = readout(manifest, cells, adc=Adc(2, signed=True))
    assert node.run(vectors([1, 1], [0, 1], [1, 0])).ravel().tolist() == [0.0, -2.0, 1.0]
    assert node.conversions.clipped == 2
    assert node.lossless_bits() == 3


def test_unit_column_is_converted_too() -> None:
    """Three inputs of 1 make 3 on the unit column, of which 1 bit holds 1."""
    chip = chip_of({"encoding": "offset", "offset_sum": "unit-column"}, cell_bits=2, dac_bits=1)
    manifest, cells = one_node([[-2], [-2], [-2]], [2], chip)
    assert readout(manifest, cells).run(vectors([1, 1, 1])).tolist() == [[[-6.0]]]
    node = readout(manifest, cells, adc=Adc(1))
    assert node.run(vectors([1, 1, 1])).tolist() == [[[-2.0]]]


def test_stuck_cells_by_hand() -> None:
    """Stuck high, every 2-bit code reads 3 - 2 = 1; stuck at 0, it reads -2."""
    manifest, cells = one_node([[1, -2], [0, -1]], [2, 2], chip_of(OFFSET, cell_bits=2, dac_bits=1))
    for high, code in ((1.0, 1), (0.0, -2)):
        disturbed = DisturbedCells(cells, manifest, CellErrors(stuck=1.0, stuck_high=high), 0, 0)
        assert readout(manifest, disturbed).run(vectors([5, 9])).tolist() == [[[14.0 * code, 14.0 * code]]]


# ------------------------------------------------------------------------------------------------------- random cells


class Levels:
    """Crossbars filled with one level."""

    def __init__(self, level: int, rows: int = 200, cols: int = 200) -> None:
        self._levels = np.full((rows, cols), level, np.uint8)

    def crossbar(self, _kind: int, _number: int) -> np.ndarray:
        return self._levels


def some_manifest() -> Manifest:
    manifest, _ = one_node([[1]], [2], chip_of(OFFSET, cell_bits=2, dac_bits=1))
    return manifest


def test_variation_is_relative_to_the_level() -> None:
    manifest = some_manifest()
    for level in (1, 3):
        found = DisturbedCells(Levels(level), manifest, CellErrors(variation=0.1), 0, 0).crossbar(0, 0)
        assert abs(found.mean() / level - 1) < 0.003
        assert abs(found.std() / level - 0.1) < 0.003
    assert not DisturbedCells(Levels(0), manifest, CellErrors(variation=0.1), 0, 0).crossbar(0, 0).any()
    assert DisturbedCells(Levels(1), manifest, CellErrors(variation=3.0), 0, 0).crossbar(0, 0).min() == 0


def test_shares_of_stuck_cells() -> None:
    errors = CellErrors(stuck=0.1, stuck_high=0.25)
    found = DisturbedCells(Levels(1), some_manifest(), errors, 0, 0).crossbar(0, 0)
    assert found.dtype == np.uint8
    assert abs((found == 3).mean() - 0.025) < 5 * math.sqrt(0.025 / found.size)
    assert abs((found == 0).mean() - 0.075) < 5 * math.sqrt(0.075 / found.size)
    assert set(np.unique(found)) == {0, 1, 3}


def test_cells_keep_their_errors_and_differ_otherwise() -> None:
    manifest, errors = some_manifest(), CellErrors(variation=0.1, stuck=0.01)

    def draw(seed: int, repeat: int, crossbar: int) -> bytes:
        return DisturbedCells(Levels(2), manifest, errors, seed, repeat).crossbar(0, crossbar).tobytes()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)}) == 4


def test_read_noise_is_that_of_the_cells_together() -> None:
    """Levels 3, 1 and 0 driven with 1, 1, 1: sigma * sqrt(9 + 1) on the bitline."""
    manifest, cells = one_node([[1], [-1], [-2]], [2], chip_of(OFFSET, cell_bits=2, dac_bits=8))
    node = readout(manifest, cells, read_noise=0.05, rng=np.random.default_rng(0))
    found = node.run(np.ones((40_000, 1, 3), np.uint8))
    assert abs(found.mean() + 2) < 5 * 0.05 * math.sqrt(10 / 40_000)
    assert abs(found.std() / (0.05 * math.sqrt(10)) - 1) < 0.02


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"variation": -0.1}, "--variation.*found -0.1"),
        ({"variation": math.nan}, "--variation.*found nan"),
        ({"read_noise": math.inf}, "--read-noise.*found inf"),
        ({"stuck": 1.5}, "--stuck: .*found 1.5"),
        ({"stuck_high": -1.0}, "--stuck-high: .*found -1"),
    ],
)
def test_impossible_errors_are_refused(figures: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CellErrors(**figures)


# --------------------------------------------------------------------------------------------------- against integers


@settings(max_examples=80, deadline=None)
@given(
    model=build.models(),
    dac_bits=st.integers(1, 9),
    active=st.none() | st.integers(1, 40),
    bits=st.none() | st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_slicing_gives_the_integer_product(
    model: Any, dac_bits: int, active: int | None, bits: int | None, seed: int
) -> None:
    """With an ideal ADC, and with one of the bits that are said to be lossless."""
    chip, nodes = model
    kind = chip.crossbars[0]
    kind = kind.model_copy(update={"rows_active": None if active is None else min(active, kind.rows)})
    chip = chip.model_copy(update={"dac_bits": dac_bits, "crossbars": (kind,)})
    manifest = build.make_manifest(nodes, chip)
    view = ManifestView(manifest)
    cells = ProgrammedCells(manifest, {item.node.name: item.codes for item in nodes})
    for item, entry in zip(nodes, manifest.nodes, strict=True):
        adc = Adc(None, chip.adc_signed)
        if bits is not None:
            adc = Adc(NodeReadout(view, entry, cells).lossless_bits() + bits, chip.adc_signed)
        node = NodeReadout(view, entry, cells, adc=adc)
        matrices = item.node.layout.to_matrices(item.codes).astype(np.int64)
        x = np.random.default_rng(seed).integers(0, 256, (3, *matrices.shape[:2]))
        x[0] = 255
        np.testing.assert_array_equal(node.run(x), np.einsum("pgk,gkm->pgm", x, matrices))
        assert node.conversions.clipped == 0
        assert node.seen_bits() <= node.lossless_bits()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_that_are_not_stored_and_kernels_in_another_order(data: st.DataObject) -> None:
    """One group in one crossbar, as the manifest can describe it beyond what placement makes."""
    rows, kernels = 12, 5
    encoding = data.draw(st.sampled_from(build.ENCODINGS))
    chip = chip_of(encoding, cell_bits=data.draw(st.sampled_from([1, 2, 4])), dac_bits=1, rows=64, cols=80)
    order = data.draw(st.permutations(range(kernels)))
    first = data.draw(st.integers(0, rows - 2))
    last = data.draw(st.integers(first + 1, rows - (first == 0)))
    layout = WeightLayout("in-out", (rows, kernels))
    item = build.random_node("n", layout, np.full(kernels, 4), chip.encoding, data.draw(st.integers(0, 99)))
    item.codes[first:last] = 0
    manifest = build.make_manifest([item], chip.model_copy(update={"flip": False}))
    entry, stored = manifest.nodes[0], rows - (last - first)
    per = manifest.encodings[0].rows_per_weight
    placements = tuple(
        p.model_copy(update={"weight_rows": (0, stored), "rows": (p.rows[0], p.rows[0] + stored * per)})
        for p in entry.placements
    )
    entry = entry.model_copy(
        update={
            "rows_not_stored": ((0, first, last),),
            "kernel_order": (tuple((k, k + 1) for k in order),),
            "placements": placements,
        }
    )
    manifest = manifest.model_copy(update={"nodes": (entry,)})
    cells = ProgrammedCells(manifest, {"n": item.codes})
    x = np.random.default_rng(0).integers(0, 256, (4, 1, rows))
    found = NodeReadout(ManifestView(manifest), entry, cells).run(x)
    np.testing.assert_array_equal(found[:, 0], x[:, 0] @ item.codes.astype(np.int64))


def test_pieces_of_vectors_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = chip_of(OFFSET, cell_bits=2, dac_bits=1)
    item = build.random_node("n", WeightLayout("conv", (9, 1, 5), 9), np.full(9, 5), "offset", 0)
    manifest = build.make_manifest([item], chip)
    cells = ProgrammedCells(manifest, {"n": item.codes})
    x = np.random.default_rng(0).integers(0, 256, (7, 9, 5))
    whole = readout(manifest, cells).run(x)
    monkeypatch.setattr("raqu_onnx.readout._PIECE", 1)
    np.testing.assert_array_equal(readout(manifest, cells).run(x), whole)


@given(st.integers(1, 1 << 18), st.integers(1, 255), st.integers(1, 128), st.lists(st.integers(-255, 255), min_size=1))
def test_pieces_are_exact_and_add_up(rows: int, largest: int, weight: int, values: list[int]) -> None:
    bits = exact_bits(rows, largest, weight)
    if bits == 0:
        assert rows * 2 * weight >= 1 << 24
        return
    x = np.clip(np.array(values, np.int16), -largest, largest).astype(np.int16)
    total = np.zeros(len(x), np.int64)
    for shift, part in _pieces(x, bits):
        assert rows * int(np.abs(part).max()) * weight < 1 << 24
        total += part.astype(np.int64) << shift
    np.testing.assert_array_equal(total, x)


@pytest.mark.parametrize(("dac", "cell"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4)])
def test_lossless_bits_follow_the_rule_of_isaac(dac: int, cell: int) -> None:
    rows = 128
    bits = Adc(None).bits_for(0, rows * ((1 << dac) - 1) * ((1 << cell) - 1))
    assert bits == 7 + dac + cell - (1 in (dac, cell))
