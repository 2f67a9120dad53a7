"""Damage of every kind to a result folder is caught by the check that it breaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from result_folders import (
    ISAAC,
    PAIRS,
    Json,
    bump,
    edit,
    failed_checks,
    put,
)

from raqu_onnx.model_io import model_digest


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
    ("cycles of a stage", ISAAC, bump("stages", GEMM, "cycles"), "totals.cost"),
    ("place in the pipeline", ISAAC, bump("stages", GEMM, "start"), "totals.cost"),
    ("energy of a stage", ISAAC, put("stages", GEMM, "energy_pj", value=1.0), "totals.cost"),
    ("latency", ISAAC, bump("totals", "cost", "latency_cycles"), "totals.cost"),
    ("critical path", ISAAC, lambda data: data["totals"]["cost"]["critical_path"].pop(), "totals.cost"),
    ("interval", ISAAC, bump("totals", "cost", "interval_cycles"), "totals.cost"),
    ("area", ISAAC, put("totals", "cost", "area_um2", value=5.0), "totals.cost"),
    ("written cells", PAIRS, bump("totals", "cost", "write_cells"), "totals.cost"),
    ("missing figures", ISAAC, lambda data: data["totals"]["cost"]["missing"].pop("energy"), "totals.cost"),
    ("cycles too large for JSON", ISAAC, put("nodes", GEMM, "mvms", value=2**53 - 1), "totals.cost"),
    ("crossbars allocated", ISAAC, bump("totals", "crossbars", 0, "allocated"), "totals.crossbars"),
    ("crossbars on the chip", ISAAC, bump("totals", "crossbars", 0, "count"), "totals.crossbars"),
    ("programmed cells", ISAAC, bump("totals", "cell_utilization", "numerator"), "totals.figures"),
    ("allocated cells", ISAAC, bump("totals", "cell_utilization", "denominator"), "totals.figures"),
    ("weight bits", ISAAC, bump("totals", "bit_utilization", "numerator"), "totals.figures"),
    ("allocated bits", ISAAC, bump("totals", "bit_utilization", "denominator"), "totals.figures"),
    ("lower bound", ISAAC, bump("totals", "lower_bound"), "totals.figures"),
    ("lower bound of cells", ISAAC, bump("totals", "lower_bound_cells"), "totals.figures"),
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
