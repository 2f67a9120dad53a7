"""Programming crossbars, the cells file, and MVMs read back from cells, without any ONNX model."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.cells import CellsFile, ProgrammedCells, cell_key, decode, flipped_columns, program, write_cells
from raqu_onnx.encodings import code_range
from raqu_onnx.errors import ManifestError, OutputError
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.layout import MappedNode, WeightLayout
from raqu_onnx.manifest import Manifest
from raqu_onnx.manifest_build import ManifestContext, build_manifest
from raqu_onnx.manifest_view import expand_ranges, flip_mask, flip_runs, to_ranges
from raqu_onnx.placement import place
from raqu_onnx.quantized import EmittedNames, QuantizedNode
from raqu_onnx.readout import mvm_from_cells
from raqu_onnx.tiling import Matrix

ENCODINGS: list[dict[str, Any]] = [
    {"encoding": "offset"},
    {"encoding": "offset", "flip": True},
    {"encoding": "offset", "offset_sum": "unit-column"},
    {"encoding": "offset", "offset_sum": "unit-column", "flip": True},
    {"encoding": "differential-column"},
    {"encoding": "differential-column", "polarity_arrays": "pair"},
    {"encoding": "differential-row"},
    {"encoding": "twos-complement"},
]
LAYOUTS = [
    WeightLayout("conv", (7, 3, 3, 2)),
    WeightLayout("conv", (9, 1, 5), 9),
    WeightLayout("conv", (6, 2, 1, 2, 2), 3),
    WeightLayout("conv-transpose", (6, 4, 2, 3), 2),
    WeightLayout("in-out", (37, 8)),
    WeightLayout("out-in", (5, 20)),
]


def make_chip(rows: int, cols: int, cell_bits: int, **settings_: Any) -> Chip:
    crossbar = CrossbarType(name="main", rows=rows, cols=cols, cell_bits=cell_bits)
    return Chip(schema_version=1, name="test", dac_bits=1, crossbars=(crossbar,), **settings_)


def make_node(name: str, layout: WeightLayout, bits: np.ndarray, codes: np.ndarray) -> QuantizedNode:
    node = MappedNode(name, "Gemm", f"{name}_x", f"{name}_w", None, f"{name}_y", layout)
    return QuantizedNode(node, bits, codes, np.ones(layout.channels, np.float32), None, None, None)


def random_node(name: str, layout: WeightLayout, bits: np.ndarray, encoding: str, seed: int) -> QuantizedNode:
    limits = np.array([code_range(encoding, int(b)) for b in bits])  # type: ignore[arg-type]
    along = [1] * len(layout.shape)
    along[layout.scale_axis] = -1
    low, high = (np.broadcast_to(limits[:, i].reshape(along), layout.shape) for i in (0, 1))
    rng = np.random.default_rng(seed)
    codes = rng.integers(low, high + 1)
    # The ends of the range are what encodings get wrong.
    extreme = rng.random(layout.shape)
    codes = np.where(extreme < 0.1, low, np.where(extreme > 0.9, high, codes))
    return make_node(name, layout, bits, codes.astype(np.int8))


def make_manifest(nodes: list[QuantizedNode], chip: Chip) -> Manifest:
    matrices = {item.node.name: Matrix.of(item.node.layout, item.bits) for item in nodes}
    names = {name: EmittedNames(f"{name}_q", f"{name}_s", None, None, None, None) for name in matrices}
    return build_manifest(
        ManifestContext(
            quantized=tuple(nodes),
            emitted=names,
            placement=place(matrices, chip),
            unmapped=(),
            model_sha256="0" * 64,
            source_sha256=None,
            configuration={},
            seed=0,
            order=tuple(matrices),
            predecessors={},
        )
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[Chip, list[QuantizedNode]]:
    chip = make_chip(
        rows=draw(st.integers(2, 40)),
        cols=draw(st.integers(17, 60)),
        cell_bits=draw(st.sampled_from([1, 2, 3, 4, 8])),
        sharing=draw(st.sampled_from(["time", "diagonal", "exclusive"])),
        split_slices=draw(st.booleans()),
        **draw(st.sampled_from(ENCODINGS)),
    )
    nodes = []
    for index, layout in enumerate(draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3))):
        widths = st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8])
        bits = np.array(draw(st.lists(widths, min_size=layout.channels, max_size=layout.channels)))
        nodes.append(random_node(f"n{index}", layout, bits, chip.encoding, draw(st.integers(0, 99))))
    return chip, nodes


@settings(max_examples=120, deadline=None)
@given(model=models(), seed=st.integers(0, 99))
def test_cells_give_back_codes_and_products(model: tuple[Chip, list[QuantizedNode]], seed: int) -> None:
    chip, nodes = model
    manifest = make_manifest(nodes, chip)
    cells = ProgrammedCells(manifest, {item.node.name: item.codes for item in nodes})
    decoded = decode(manifest, cells)
    for item, entry in zip(nodes, manifest.nodes, strict=True):
        np.testing.assert_array_equal(decoded[entry.name], item.codes)
        matrices = item.node.layout.to_matrices(item.codes).astype(np.int64)
        x = np.random.default_rng(seed).integers(0, 256, (3, *matrices.shape[:2]))
        x[0] = 255
        got = mvm_from_cells(entry, manifest, cells, x)
        np.testing.assert_array_equal(got, np.einsum("pgk,gkm->pgm", x, matrices))


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_every_weight_cell_is_programmed_once(model: tuple[Chip, list[QuantizedNode]]) -> None:
    chip, nodes = model
    manifest = make_manifest(nodes, chip)
    full = (1 << chip.crossbars[0].cell_bits) - 1
    used, units = 0, 0
    for kind, crossbar, levels in program(manifest, {item.node.name: item.codes for item in nodes}):
        assert levels.max(initial=0) <= full
        mask = np.zeros(levels.shape, int)
        for node in manifest.nodes:
            for p in node.placements:
                if (p.type, p.crossbar) == (kind, crossbar):
                    mask[slice(*p.rows), slice(*p.cols)] += 1
                    units += 0 if p.unit_column is None else p.rows[1] - p.rows[0]
        assert mask.max(initial=0) <= 1
        assert not levels[mask == 0].any()
        used += int(mask.sum())
    assert used - units == manifest.totals.cell_utilization.numerator


def test_levels_by_hand() -> None:
    """Code -5 of 4 bits in 2-bit cells, in every encoding."""
    layout = WeightLayout("in-out", (1, 1))
    node = make_node("n", layout, np.array([4]), np.array([[-5]], np.int8))
    expected = {
        "offset": [[3, 0]],  # -5 + 8 = 3
        "twos-complement": [[3, 0, 1]],  # 1011: low bits 011, sign 1
        "differential-column": [[0, 0, 1, 1]],  # 5 = 1 + 4 * 1
        "differential-row": [[0, 0], [1, 1]],
    }
    for encoding, levels in expected.items():
        chip = make_chip(4, 8, 2, encoding=encoding, sharing="time")
        ((_, _, crossbar),) = program(make_manifest([node], chip), {"n": node.codes})
        want = np.zeros((4, 8), np.uint8)
        want[: len(levels), : len(levels[0])] = levels
        np.testing.assert_array_equal(crossbar, want)


def test_unit_column_and_flip_by_hand() -> None:
    codes = np.array([[7, -8], [7, -7], [7, -8]], np.int8)
    node = make_node("n", WeightLayout("in-out", (3, 2)), np.array([4, 4]), codes)
    chip = make_chip(4, 6, 4, encoding="offset", offset_sum="unit-column", flip=True, sharing="time")
    manifest = make_manifest([node], chip)
    placement = manifest.nodes[0].placements[0]
    # 7 + 8 = 15 in every row is more than half of 3 * 15; -8 + 8 = 0 and 1 are less.
    assert placement.flipped == (0, 1)
    assert placement.unit_column == 2
    ((_, _, crossbar),) = program(manifest, {"n": codes})
    np.testing.assert_array_equal(crossbar[:3, :3], [[0, 0, 1], [0, 1, 1], [0, 0, 1]])


def test_pairs_lie_at_the_same_place_of_neighbouring_arrays() -> None:
    node = make_node("n", WeightLayout("in-out", (1, 2)), np.array([3, 3]), np.array([[3, -2]], np.int8))
    chip = make_chip(4, 4, 2, encoding="differential-column", polarity_arrays="pair", sharing="time")
    manifest = make_manifest([node], chip)
    assert [(p.crossbar, p.polarity) for p in manifest.nodes[0].placements] == [(0, "positive"), (1, "negative")]
    positive, negative = (levels[0, :2].tolist() for _, _, levels in program(manifest, {"n": node.codes}))
    assert (positive, negative) == ([3, 0], [0, 2])


def test_column_is_flipped_only_beyond_half_of_its_sum() -> None:
    levels = np.array([[3, 3, 0], [0, 1, 3], [0, 3, 0], [3, 0, 3]], np.uint8)  # sums 6, 7, 6 of 12
    assert flipped_columns(levels, 2).tolist() == [False, True, False]


@given(st.lists(st.booleans(), max_size=30))
def test_flip_runs_round_trip(mask: list[bool]) -> None:
    array = np.array(mask, bool)
    runs = flip_runs(array)
    assert flip_mask(runs, len(mask)).tolist() == mask
    assert all(runs[1:])


@given(st.lists(st.integers(0, 20), unique=True))
def test_ranges_round_trip(numbers: list[int]) -> None:
    ranges = to_ranges(np.array(numbers, np.int64))
    assert expand_ranges(ranges).tolist() == numbers
    assert all(first < last for first, last in ranges)


def sample() -> tuple[Manifest, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    nodes = [
        random_node(f"n{i}", layout, rng.choice([2, 3, 8], layout.channels), "offset", i)
        for i, layout in enumerate(LAYOUTS)
    ]
    manifest = make_manifest(nodes, make_chip(32, 32, 2, encoding="offset", sharing="time"))
    return manifest, {item.node.name: item.codes for item in nodes}


def test_cells_file_round_trip(tmp_path: Path) -> None:
    manifest, codes = sample()
    write_cells(tmp_path / "cells.npz", manifest, codes)
    with CellsFile(tmp_path / "cells.npz", manifest) as cells:
        assert cells.keys == {f"main/{n:06d}" for n in range(manifest.totals.crossbars[0].allocated)}
        for name, decoded in decode(manifest, cells).items():
            np.testing.assert_array_equal(decoded, codes[name])
    with np.load(tmp_path / "cells.npz", allow_pickle=False) as archive:
        array = archive[cell_key(manifest, 0, 0)]
        assert (array.dtype, array.shape) == (np.uint8, (32, 32))


def test_cells_file_has_equal_bytes_each_time(tmp_path: Path) -> None:
    manifest, codes = sample()
    for name in ("one.npz", "two.npz"):
        write_cells(tmp_path / name, manifest, codes)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_code_out_of_range_is_refused() -> None:
    node = make_node("n", WeightLayout("in-out", (1, 1)), np.array([2]), np.array([[1]], np.int8))
    manifest = make_manifest([node], make_chip(4, 4, 2, encoding="offset", sharing="time"))
    with pytest.raises(ValueError, match="codes reach from 2 to 2"):
        list(program(manifest, {"n": np.array([[2]], np.int8)}))


def test_unreadable_cells_files(tmp_path: Path) -> None:
    manifest, codes = sample()
    with pytest.raises(ManifestError, match=r"absent\.npz"):
        CellsFile(tmp_path / "absent.npz", manifest)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ManifestError, match=r"is not an \.npz file"):
        CellsFile(tmp_path / "array.npy", manifest)
    np.savez(tmp_path / "pickled.npz", **{"main/000000": np.array([{}], object)})
    with CellsFile(tmp_path / "pickled.npz", manifest) as cells, pytest.raises(ManifestError, match="main/000000"):
        cells.crossbar(0, 0)
    np.savez(tmp_path / "small.npz", **{"main/000000": np.zeros((2, 2), np.uint8)})
    with CellsFile(tmp_path / "small.npz", manifest) as cells:
        with pytest.raises(ManifestError, match=r"uint8\[2, 2\]"):
            cells.crossbar(0, 0)
        with pytest.raises(ManifestError, match="main/000001"):
            cells.crossbar(0, 1)
    with pytest.raises(OutputError, match="cells"):
        write_cells(tmp_path / "no" / "cells.npz", manifest, codes)
