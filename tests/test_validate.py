"""Output folders that a stranger re-reads: sound ones pass, and damage of every kind is caught."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from raqu_onnx.cells import write_cells
from raqu_onnx.cli import main
from raqu_onnx.encodings import code_range
from raqu_onnx.errors import DataError, ManifestError, ModelError
from raqu_onnx.graph_edit import infer_shapes
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.layout import MappedNode
from raqu_onnx.manifest import DataProvenance, digest_of, read_manifest
from raqu_onnx.manifest_build import ManifestContext, build_manifest
from raqu_onnx.manifest_stages import execution_order
from raqu_onnx.mapping import scan
from raqu_onnx.model_io import load_model, model_digest
from raqu_onnx.placement import place
from raqu_onnx.quantized import ActivationQuantizer, EmittedNames, QuantizedNode
from raqu_onnx.tiling import Matrix
from raqu_onnx.validate_phases import FolderChecks
from raqu_onnx.validate_report import Checklist, ValidationReport
from raqu_onnx.validation import validate

Json = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------ models


@dataclass
class FloatModel:
    """A float model under construction."""

    nodes: list[onnx.NodeProto]
    weights: dict[str, np.ndarray]

    def add(self, op: str, x: str, shape: tuple[int, ...] | None = None, bias: int = 0, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        inputs = [x]
        if shape is not None:
            self.weights[f"{name}_w"] = np.zeros(shape, np.float32)
            inputs.append(f"{name}_w")
        if bias:
            self.weights[f"{name}_b"] = np.zeros(bias, np.float32)
            inputs.append(f"{name}_b")
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_y"], name=name, **attributes))
        return f"{name}_y"


def picture_net() -> onnx.ModelProto:
    """Every mappable operator, grouped ones and one node that cannot be mapped."""
    m = FloatModel([], {})
    y = m.add("Conv", "x", (8, 3, 3, 3), bias=8, strides=[2, 2], pads=[1, 0, 1, 1])
    y = m.add("Relu", y)
    y = m.add("Conv", y, (8, 1, 3, 3), bias=8, group=8, auto_pad="SAME_UPPER")
    y = m.add("ConvTranspose", y, (8, 3, 2, 3), group=2, strides=[2, 1], pads=[0, 1, 0, 0], output_padding=[1, 0])
    y = m.add("Flatten", y)
    m.weights["skip_w"] = np.zeros((9, 6 * 9 * 5), np.float32)
    m.nodes.append(helper.make_node("Gemm", [y, "skip_w"], ["gemm_y"], name="gemm", transB=1))
    out = m.add("MatMul", "gemm_y", (9, 5))
    m.nodes.append(helper.make_node("Transpose", [out], ["turned"], name="turn"))
    m.nodes.append(helper.make_node("MatMul", [out, "turned"], ["gram"], name="gram"))
    return float_model(m, [2, 3, 8, 8], [out, "gram"])


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


def float_model(m: FloatModel, shape: list[int], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        m.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in m.weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quantize(
    node: MappedNode, encoding: str, rng: np.random.Generator, widths: tuple[int, ...], bits: int
) -> QuantizedNode:
    layout = node.layout
    channel_bits = rng.choice(widths, layout.channels)
    limits = np.array([code_range(encoding, int(b)) for b in channel_bits])  # type: ignore[arg-type]
    along = [1] * len(layout.shape)
    along[layout.scale_axis] = -1
    codes = rng.integers(limits[:, 0].reshape(along), limits[:, 1].reshape(along) + 1, layout.shape).astype(np.int8)
    bias = None
    if node.bias_name is not None:
        bias = rng.integers(-2000, 2001, layout.groups * layout.kernels).astype(np.int32)
        bias[channel_bits[layout.channel_index().reshape(-1)] == 0] = 0
    scales = (rng.uniform(0.5, 1.0, layout.channels) / np.maximum(1, limits[:, 1])).astype(np.float32)
    activation = ActivationQuantizer(bits, float(np.float32(6 / ((1 << bits) - 1))), (1 << bits) // 3)
    return QuantizedNode(node, channel_bits, codes, scales, bias, None, activation)


def emit(source: onnx.ModelProto, quantized: list[QuantizedNode]) -> tuple[onnx.ModelProto, dict[str, EmittedNames]]:
    """The QDQ model, and the names in it."""
    model = copy.deepcopy(source)
    graph, by_name = model.graph, {item.node.name: item for item in quantized}
    replaced = {name for item in quantized for name in (item.node.weight_name, item.node.bias_name)}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    nodes, names = [], {}

    def constant(name: str, array: np.ndarray) -> str:
        kept.append(numpy_helper.from_array(array, name))
        return name

    for node in graph.node:
        item = by_name.get(node.name)
        if item is not None:
            base, slot, act = node.name, 0 if item.node.constant_left else 1, item.activation
            assert act is not None
            sx = constant(f"{base}_sx", np.array(act.scale, np.float32))
            zx = constant(f"{base}_zx", np.array(act.zero_point, np.uint8))
            code = f"{base}_xq"
            nodes.append(helper.make_node("QuantizeLinear", [node.input[1 - slot], sx, zx], [code], f"{base}_q"))
            if act.bits < 8:
                low = constant(f"{base}_low", np.array(0, np.uint8))
                high = constant(f"{base}_high", np.array(act.levels, np.uint8))
                nodes.append(helper.make_node("Clip", [code, low, high], [f"{base}_xc"], f"{base}_clip"))
                code = f"{base}_xc"
            nodes.append(helper.make_node("DequantizeLinear", [code, sx, zx], [f"{base}_xd"], f"{base}_dq"))
            wq, sw = constant(f"{base}_wq", item.codes), constant(f"{base}_sw", item.scales)
            zw = constant(f"{base}_zw", np.zeros(item.scales.shape, np.int8))
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [wq, sw, zw], [f"{base}_wd"], f"{base}_wdq", axis=item.node.layout.scale_axis
                )
            )
            node.input[1 - slot], node.input[slot] = f"{base}_xd", f"{base}_wd"
            bq = None
            if item.bias is not None:
                bq, sb = constant(f"{base}_bq", item.bias), constant(f"{base}_sb", item.bias_scales())
                nodes.append(helper.make_node("DequantizeLinear", [bq, sb], [f"{base}_bd"], f"{base}_bdq", axis=0))
                node.input[2] = f"{base}_bd"
            names[base] = EmittedNames(wq, sw, bq, code, sx, zx)
        nodes.append(node)
    copies = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return model, names


def small_chip(encoding: str, *, rows: int = 48, cols: int = 32, cell_bits: int = 2, **settings_: Any) -> Chip:
    settings_.setdefault("sharing", "time")
    crossbars = (CrossbarType(name="main", rows=rows, cols=cols, cell_bits=cell_bits, count=4000),)
    return Chip(schema_version=1, name="test", encoding=encoding, dac_bits=1, crossbars=crossbars, **settings_)


def write_folder(
    folder: Path,
    chip: Chip,
    *,
    source: onnx.ModelProto | None = None,
    cells: bool = True,
    widths: tuple[int, ...] = (0, 2, 3, 4, 8),
    seed: int = 0,
) -> None:
    rng = np.random.default_rng(seed)
    proto = picture_net() if source is None else source
    model = load_model(proto)
    infer_shapes(model)
    mapped, unmapped = scan(model)
    order, predecessors = execution_order(model, [node.name for _, node in mapped])
    quantized = [
        quantize(node, chip.encoding, rng, widths, (8, 4, 5, 8, 3)[i % 5]) for i, (_, node) in enumerate(mapped)
    ]
    emitted, names = emit(proto, quantized)
    folder.mkdir(exist_ok=True)
    onnx.save(emitted, str(folder / "model.onnx"))
    onnx.save(proto, str(folder / "float.onnx"))
    matrices = {item.node.name: Matrix.of(item.node.layout, item.bits) for item in quantized}
    context = ManifestContext(
        quantized=tuple(quantized),
        emitted=names,
        placement=place(matrices, chip),
        unmapped=tuple(unmapped),
        model_sha256=model_digest(folder / "model.onnx"),
        source_sha256=model_digest(folder / "float.onnx"),
        configuration={"weight_bits": [2, 8], "nested": {"share": 0.5}},
        seed=7,
        order=order,
        predecessors=predecessors,
        calibration=DataProvenance(name="synthetic", digest="ab", samples=8, synthetic=True),
    )
    manifest = build_manifest(context)
    manifest.write(folder / "manifest.json")
    if cells:
        write_cells(folder / "cells.npz", manifest, {item.node.name: item.codes for item in quantized})


def failed(report: ValidationReport) -> set[str]:
    return {check.name for check in report.failures}


def failed_checks(folder: Path) -> set[str]:
    """What `validate` finds before it runs the model."""
    checklist = Checklist()
    FolderChecks(folder, checklist).run(load_model(folder / "model.onnx", check_weights=False))
    return failed(ValidationReport(tuple(checklist.checks)))


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


def test_several_crossbar_types_pass(tmp_path: Path) -> None:
    types = tuple(CrossbarType(name=f"t{n}", rows=n, cols=n, cell_bits=2, count=60) for n in (16, 64, 128))
    chip = Chip(schema_version=1, name="test", encoding="offset", sharing="time", dac_bits=1, crossbars=types)
    write_folder(tmp_path, chip)
    assert validate(tmp_path, threads=1).failures == ()


def test_node_without_any_kernel_passes(tmp_path: Path) -> None:
    write_folder(tmp_path, small_chip("offset"), widths=(0,))
    assert validate(tmp_path, threads=1).failures == ()
    assert read_manifest(tmp_path / "manifest.json").totals.placements == 0


# ------------------------------------------------------------------------------------------------------------- damage

ISAAC = "offset, unit column, flipped, shared in time"
PAIRS = "differential, pairs of arrays"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    folders = {ISAAC: root / "isaac", PAIRS: root / "pairs"}
    write_folder(folders[ISAAC], small_chip("offset", offset_sum="unit-column", flip=True))
    write_folder(folders[PAIRS], small_chip("differential-column", polarity_arrays="pair"))
    return folders


@pytest.fixture
def folder(sound: dict[str, Path], tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def fresh(kind: str = ISAAC) -> Path:
        return Path(shutil.copytree(sound[kind], tmp_path / "out"))

    return fresh  # type: ignore[return-value]


def edit(path: Path, damage: Callable[[Json], object], *, seal: bool = True) -> None:
    """Change a manifest; sealed again, so that its digest does not give the damage away."""
    data = json.loads(path.read_text())
    before = copy.deepcopy(data)
    damage(data)
    assert data != before, "nothing was changed"
    if seal:
        data["digest"] = digest_of(data)
    path.write_text(json.dumps(data))


def bump(*path: str | int, by: float = 1) -> Callable[[Json], None]:
    """Add to one number."""

    def damage(data: Json) -> None:
        place_: Any = data
        for key in path[:-1]:
            place_ = place_[key]
        place_[path[-1]] += by

    return damage


def put(*path: str | int, value: object) -> Callable[[Json], None]:
    """Set one value."""

    def damage(data: Json) -> None:
        place_: Any = data
        for key in path[:-1]:
            place_ = place_[key]
        place_[path[-1]] = value

    return damage


def shift(*keys: str, by: int = 1) -> Callable[[Json], None]:
    """Move the ranges of the first placement of the first node."""

    def damage(data: Json) -> None:
        for key in keys:
            placement = data["nodes"][0]["placements"][0]
            placement[key] = [value + by for value in placement[key]]

    return damage


def onto_another(data: Json) -> None:
    """Lay a block on top of one of another node, where both are as large."""
    everything = [p for node in data["nodes"] for p in node["placements"]]
    for one in everything:
        for other in everything:
            alike = one["rows"][1] - one["rows"][0] == other["rows"][1] - other["rows"][0]
            if one is not other and alike and one["cols"][1] - one["cols"][0] == other["cols"][1] - other["cols"][0]:
                one.update({key: other[key] for key in ("crossbar", "rows", "cols", "unit_column")})
                return


def same_turn(data: Json) -> None:
    next(p for node in data["nodes"] for p in node["placements"] if p["turn"])["turn"] = 0


def lower_flip(data: Json) -> None:
    next(p for node in data["nodes"] for p in node["placements"] if p["flipped"])["flipped"][0] ^= 1


FIRST = ("nodes", 0, "placements", 0)
CONV, DEPTHWISE, UP, GEMM, MATMUL = range(5)

# (what, which folder, damage, check that must catch it)
DAMAGE: list[tuple[str, str, Callable[[Json], None], str]] = [
    ("model hash", ISAAC, put("model", "sha256", value="0" * 64), "model.sha256"),
    ("groups", ISAAC, bump("nodes", CONV, "matrix", "groups"), "node.matrix"),
    ("rows K", ISAAC, bump("nodes", CONV, "matrix", "rows"), "node.matrix"),
    ("kernels M", ISAAC, bump("nodes", GEMM, "matrix", "kernels"), "node.matrix"),
    ("tensor shape", ISAAC, bump("nodes", CONV, "matrix", "shape", 1), "node.matrix"),
    ("scale axis", ISAAC, put("nodes", MATMUL, "matrix", "scale_axis", value=0), "node.matrix"),
    ("row order", ISAAC, put("nodes", CONV, "matrix", "row_order", value="(k1, k2, c)"), "node.matrix"),
    ("layout kind", ISAAC, put("nodes", GEMM, "matrix", "kind", value="in-out"), "node.attributes"),
    ("stride", ISAAC, bump("nodes", CONV, "window", "strides", 0), "node.attributes"),
    ("pad", ISAAC, bump("nodes", UP, "window", "pads", 1), "node.attributes"),
    ("dilation", ISAAC, bump("nodes", UP, "window", "dilations", 1), "node.attributes"),
    ("output padding", ISAAC, put("nodes", UP, "window", "output_padding", 0, value=0), "node.attributes"),
    ("kernel size", ISAAC, bump("nodes", CONV, "window", "kernel", 0), "node.attributes"),
    ("transA", ISAAC, put("nodes", GEMM, "input_transposed", value=True), "node.attributes"),
    ("MVMs", ISAAC, bump("nodes", CONV, "mvms"), "node.mvms"),
    ("weight scale", ISAAC, bump("nodes", CONV, "scales", 3, by=1e-6), "node.weight"),
    ("codes initializer", ISAAC, put("nodes", CONV, "weight", value="gemm_wq"), "node.weight"),
    ("activation scale", ISAAC, bump("nodes", CONV, "activation", "scale", by=1e-6), "node.activation-chain"),
    ("zero point", ISAAC, bump("nodes", CONV, "activation", "zero_point"), "node.activation-chain"),
    ("activation bits", ISAAC, bump("nodes", DEPTHWISE, "activation", "bits"), "node.activation-chain"),
    ("activation tensor", ISAAC, put("nodes", UP, "activation", "tensor", value="x"), "node.activation-chain"),
    ("bias initializer", ISAAC, put("nodes", CONV, "bias", value=None), "node.bias"),
    ("run of bits", ISAAC, bump("nodes", GEMM, "bits", 0, 1), "node.bits"),
    ("width of a run", ISAAC, put("nodes", GEMM, "bits", 0, 0, value=6), "encoding.tables"),
    ("dropped kernels", ISAAC, put("nodes", CONV, "dropped_kernels", value=[[0, 1], [1, 2]]), "node.bits"),
    ("column order", ISAAC, bump("nodes", CONV, "kernel_order", 0, 0, 1), "node.kernel-order"),
    ("rows not stored", ISAAC, put("nodes", CONV, "rows_not_stored", value=[[0, 0, 1]]), "placement.bounds"),
    ("slice shift", ISAAC, bump("encodings", 0, "widths", 0, "slices", 0, "shift"), "encoding.tables"),
    ("slice column", ISAAC, bump("encodings", 0, "widths", 1, "slices", 0, "column"), "encoding.tables"),
    ("slice sign", PAIRS, put("encodings", 0, "widths", 0, "slices", 1, "sign", value=1), "encoding.tables"),
    ("offset", ISAAC, bump("encodings", 0, "widths", 0, "offset"), "encoding.tables"),
    ("cell bits of the table", ISAAC, bump("encodings", 0, "cell_bits"), "encoding.tables"),
    ("cell bits of the chip", ISAAC, bump("chip", "crossbars", 0, "cell_bits"), "encoding.tables"),
    ("crossbar rows", ISAAC, bump("chip", "crossbars", 0, "rows"), "totals.figures"),
    ("crossbar count", ISAAC, put("chip", "crossbars", 0, "count", value=1), "placement.bounds"),
    ("rows beyond the crossbar", ISAAC, shift("rows", by=1000), "placement.bounds"),
    ("columns beyond the crossbar", ISAAC, shift("cols", "columns", by=10_000), "placement.bounds"),
    ("crossbar number", ISAAC, put(*FIRST, "crossbar", value=3999), "totals.crossbars"),
    ("crossbar type", ISAAC, put(*FIRST, "type", value=1), "encoding.tables"),
    ("group", ISAAC, put("nodes", DEPTHWISE, "placements", 0, "group", value=7), "placement.coverage"),
    ("one wordline less", ISAAC, bump(*FIRST, "rows", 1, by=-1), "placement.shape"),
    ("one bitline less", ISAAC, bump(*FIRST, "cols", 1, by=-1), "placement.shape"),
    ("unit column", ISAAC, bump(*FIRST, "unit_column", by=-1), "placement.shape"),
    ("kernel range", ISAAC, bump(*FIRST, "kernels", 1, by=-1), "placement.shape"),
    ("first slice", ISAAC, bump(*FIRST, "first_slice"), "placement.shape"),
    ("weight rows", ISAAC, put("nodes", GEMM, "placements", -1, "weight_rows", value=[0, 18]), "placement.coverage"),
    ("replica", ISAAC, bump(*FIRST, "replica"), "placement.coverage"),
    ("placement lost", ISAAC, lambda data: data["nodes"][GEMM]["placements"].pop(), "placement.coverage"),
    ("overlap", ISAAC, onto_another, "placement.overlap"),
    ("sharing mode", ISAAC, put("sharing", value="exclusive"), "placement.sharing"),
    ("partial sum", ISAAC, bump("nodes", GEMM, "placements", -1, "partial_sum"), "placement.partial-sums"),
    ("turn", ISAAC, same_turn, "placement.turns"),
    ("flipped columns", ISAAC, lower_flip, "placement.flipped"),
    ("polarity", PAIRS, put(*FIRST, "polarity", value="negative"), "placement.polarity"),
    ("one of a pair moved", PAIRS, shift("cols"), "placement.polarity"),
    ("turns of a stage", ISAAC, bump("stages", GEMM, "turns"), "stages.nodes"),
    ("rivals of a stage", ISAAC, lambda data: data["stages"][GEMM]["shares_with"].pop(), "stages.nodes"),
    ("order of stages", ISAAC, lambda data: data["stages"].reverse(), "stages.order"),
    ("dependencies", ISAAC, put("stages", GEMM, "after", value=[]), "stages.order"),
    ("crossbars allocated", ISAAC, bump("totals", "crossbars", 0, "allocated"), "totals.crossbars"),
    ("crossbars on the chip", ISAAC, bump("totals", "crossbars", 0, "count"), "totals.crossbars"),
    ("programmed cells", ISAAC, bump("totals", "cell_utilization", "numerator"), "totals.figures"),
    ("allocated cells", ISAAC, bump("totals", "cell_utilization", "denominator"), "totals.figures"),
    ("weight bits", ISAAC, bump("totals", "bit_utilization", "numerator"), "totals.figures"),
    ("allocated bits", ISAAC, bump("totals", "bit_utilization", "denominator"), "totals.figures"),
    ("lower bound", ISAAC, bump("totals", "lower_bound"), "totals.figures"),
    ("dropped total", ISAAC, bump("totals", "dropped_kernels"), "totals.figures"),
    ("executable", ISAAC, put("executable", value=False), "node.activation"),
    ("node lost", ISAAC, lambda data: data["nodes"].pop(), "model.unmapped"),
    ("node twice", ISAAC, lambda data: data["nodes"].append(data["nodes"][0]), "node.names"),
    ("unmapped node", ISAAC, lambda data: data["unmapped"].clear(), "model.unmapped"),
    ("negative number", ISAAC, put("seed", value=-1), "manifest.schema"),
    ("unknown key", ISAAC, put("extra", value=1), "manifest.schema"),
    ("number as text", ISAAC, put("seed", value="7"), "manifest.schema"),
    ("version", ISAAC, put("version", value=2), "manifest.schema"),
]


@pytest.mark.parametrize(("kind", "damage", "check"), [pytest.param(*row[1:], id=row[0]) for row in DAMAGE])
def test_damaged_manifest_is_caught(
    kind: str, damage: Callable[[Json], None], check: str, folder: Callable[[str], Path]
) -> None:
    out = folder(kind)
    edit(out / "manifest.json", damage)
    found = failed_checks(out)
    assert check in found
    assert "manifest.digest" not in found


def test_kinds_of_damage_are_many() -> None:
    assert len({name for name, *_ in DAMAGE}) == len(DAMAGE) >= 70


def rewrite_cells(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key].copy() for key in archive.files}
    change(arrays)
    np.savez_compressed(path, **arrays)


def damage_cell(find: Callable[[Json, Json], tuple[int, int]]) -> Callable[[dict[str, np.ndarray], Json], None]:
    """Change the level of one cell of the first placement's crossbar."""

    def damage(arrays: dict[str, np.ndarray], manifest: Json) -> None:
        placement = manifest["nodes"][0]["placements"][0]
        arrays[f"main/{placement['crossbar']:06d}"][find(placement, manifest)] ^= 1

    return damage


def free_cell(arrays: dict[str, np.ndarray], manifest: Json) -> None:
    free = {key: np.ones(array.shape, bool) for key, array in arrays.items()}
    for node in manifest["nodes"]:
        for p in node["placements"]:
            free[f"main/{p['crossbar']:06d}"][slice(*p["rows"]), slice(*p["cols"])] = False
    key = next(key for key, mask in free.items() if mask.any())
    arrays[key][tuple(np.argwhere(free[key])[0])] = 1


def too_high(arrays: dict[str, np.ndarray], _: Json) -> None:
    arrays["main/000000"][0, 0] = 4


def lose(arrays: dict[str, np.ndarray], _: Json) -> None:
    del arrays["main/000000"]


def add(arrays: dict[str, np.ndarray], _: Json) -> None:
    arrays["main/009999"] = arrays["main/000000"]


def cut(arrays: dict[str, np.ndarray], _: Json) -> None:
    arrays["main/000000"] = arrays["main/000000"][:-1]


def widen(arrays: dict[str, np.ndarray], _: Json) -> None:
    arrays["main/000000"] = arrays["main/000000"].astype(np.int64)


def swap(arrays: dict[str, np.ndarray], _: Json) -> None:
    one, other = sorted(arrays)[:2]
    arrays[one], arrays[other] = arrays[other], arrays[one]


CELL_DAMAGE = {
    "weight cell": (damage_cell(lambda p, _: (p["rows"][0], p["cols"][0])), "cells.codes"),
    "weight cell, by MVM": (damage_cell(lambda p, _: (p["rows"][0], p["cols"][0])), "cells.mvm"),
    "last weight cell": (damage_cell(lambda p, _: (p["rows"][1] - 1, p["cols"][1] - 2)), "cells.codes"),
    "unit column": (damage_cell(lambda p, _: (p["rows"][0], p["unit_column"])), "cells.unused"),
    "free cell": (free_cell, "cells.unused"),
    "level too high": (too_high, "cells.arrays"),
    "array lost": (lose, "cells.arrays"),
    "array too many": (add, "cells.arrays"),
    "array cut": (cut, "cells.arrays"),
    "array widened": (widen, "cells.arrays"),
    "arrays swapped": (swap, "cells.codes"),
}


@pytest.mark.parametrize("kind", CELL_DAMAGE)
def test_damaged_cells_are_caught(kind: str, folder: Callable[[str], Path]) -> None:
    out = folder(ISAAC)
    damage, check = CELL_DAMAGE[kind]
    manifest = json.loads((out / "manifest.json").read_text())
    rewrite_cells(out / "cells.npz", lambda arrays: damage(arrays, manifest))
    assert check in failed_checks(out)


def change_initializer(name: str, change: Callable[[np.ndarray], object]) -> Callable[[onnx.ModelProto], None]:
    def damage(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return damage


def set_attribute(node: str, **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    def damage(model: onnx.ModelProto) -> None:
        proto = next(n for n in model.graph.node if n.name == node)
        kept = [a for a in proto.attribute if a.name not in attributes]
        del proto.attribute[:]
        proto.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attributes.items())])

    return damage


def xor_first(array: np.ndarray) -> None:
    array.reshape(-1)[:40] ^= 1


def rename(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.name == "gemm").name = "other"


MODEL_DAMAGE = {
    "codes": (change_initializer("gemm_wq", xor_first), "cells.codes"),
    "codes, range": (change_initializer("gemm_wq", lambda a: a.fill(-128)), "codes.range"),
    "scale": (change_initializer("conv0_sw", lambda a: a.__imul__(2)), "node.weight"),
    "weight zero point": (change_initializer("conv0_zw", lambda a: a.__iadd__(1)), "node.weight"),
    "activation scale": (change_initializer("conv0_sx", lambda a: a.__imul__(2)), "node.activation-chain"),
    "activation zero point": (change_initializer("conv0_zx", lambda a: a.__iadd__(1)), "node.activation-chain"),
    "clip": (change_initializer("conv2_high", lambda a: a.__iadd__(1)), "node.activation-chain"),
    "bias of a dropped kernel": (change_initializer("conv0_bq", lambda a: a.__iadd__(1)), "node.bias"),
    "bias scale": (change_initializer("conv0_sb", lambda a: a.__imul__(2)), "node.bias"),
    "stride": (set_attribute("conv0", strides=[1, 1]), "node.attributes"),
    "axis of scales": (set_attribute("conv2_wdq", axis=1), "node.weight"),
    "alpha": (set_attribute("gemm", alpha=2.0), "node.attributes"),
    "node name": (rename, "node.onnx"),
}


@pytest.mark.parametrize("kind", MODEL_DAMAGE)
def test_model_that_is_not_the_manifests_is_caught(kind: str, folder: Callable[[str], Path]) -> None:
    out = folder(ISAAC)
    damage, check = MODEL_DAMAGE[kind]
    model = onnx.load(str(out / "model.onnx"))
    damage(model)
    onnx.save(model, str(out / "model.onnx"))
    assert "model.sha256" in failed_checks(out)
    edit(out / "manifest.json", put("model", "sha256", value=model_digest(out / "model.onnx")))
    found = failed_checks(out)
    assert check in found
    assert "model.sha256" not in found


def test_weights_in_another_row_order_are_caught(folder: Callable[[str], Path], monkeypatch: Any) -> None:
    """The comparison with onnxruntime does not read the layout: a wrong one on the crossbar side shows."""
    from raqu_onnx.layout import WeightLayout

    original = WeightLayout.to_matrices

    def turned(self: WeightLayout, weight: np.ndarray) -> np.ndarray:
        return original(self, np.swapaxes(weight, 2, 3) if weight.ndim == 4 and weight.shape[2] == 3 else weight)

    out = folder(ISAAC)
    (out / "cells.npz").unlink()
    monkeypatch.setattr(WeightLayout, "to_matrices", turned)
    assert "cells.mvm" in failed_checks(out)


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
