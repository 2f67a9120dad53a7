"""What a run would do, found out without running it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raqu_onnx.annotations import KEPT, MAPPED, mapped_nodes, unmapped_nodes
from raqu_onnx.encodings import MAX_BITS
from raqu_onnx.errors import naming_model
from raqu_onnx.goals import goal_on
from raqu_onnx.hardware import Chip, load_chip
from raqu_onnx.inspection import place_anyway
from raqu_onnx.model_io import load_model
from raqu_onnx.output import check_output
from raqu_onnx.partitioning import too_large_alone, without_counts
from raqu_onnx.passes.annotate_tiling import AnnotateTilingPass
from raqu_onnx.passes.tidy import TidyPass
from raqu_onnx.pipeline import Resources, build_pipeline
from raqu_onnx.results import describe_goal
from raqu_onnx.run_data import describe, open_run_data
from raqu_onnx.search import check_room
from raqu_onnx.shortage import shortage
from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.placement import Placement
    from raqu_onnx.run_data import RunData
    from raqu_onnx.search import NodeWidth

__all__ = ["plan"]


def plan(
    model: str | Path, output: str | Path | None, *, config: OptimizeConfig, force: bool = False
) -> dict[str, Any]:
    """Open and check all that a run needs, and say what it would do; nothing is written.

    Raises:
        RaquError: As `optimize` would.
    """
    folder = output or config.output
    if folder is not None:
        check_output(Path(folder), force=force, source=Path(model))
    with naming_model(model):
        loaded = load_model(model)
        chip = load_chip(config.hw)
        data = open_run_data(loaded, config)
        passes = build_pipeline(config, Resources(chip, data.calibration, data.selection, Path()))
        tidied = TidyPass(exclude=config.exclude)(loaded).model
        AnnotateTilingPass(config.exclude, config.keep, config.input_bits[0])(tidied)
    kept = _kept(tidied)
    room = _room(tidied, chip if config.partitions is None else without_counts(chip), config, kept)
    nodes = mapped_nodes(tidied)
    return {
        "mapped_nodes": len(nodes),
        "unmapped_nodes": len(unmapped_nodes(tidied)),
        "chip": chip.name,
        "crossbars": {kind.name: kind.count for kind in chip.crossbars},
        "uniform_8_bit_crossbars": _place(tidied, chip, (MAX_BITS,) * len(nodes))[0].crossbars,
        "room": room,
        "calibration": describe(data.calibration),
        "selection": _selection(data, config),
        "evaluation": "none" if data.evaluation is None else describe(data.evaluation),
        "widths": _widths(config, [nodes[position].name or "" for position in sorted(kept)]),
        "method": " ".join(config.method) or "the default",
        "goal": describe_goal(goal_on(config, chip), fixed=config.search_settings.is_uniform),
        "passes": [str(getattr(item, "name", item)) for item in passes],
        "warnings": list(data.warnings),
    }


def _selection(data: RunData, config: OptimizeConfig) -> str:
    if data.selection is data.calibration and config.search_settings.is_uniform:
        return "none: the widths are fixed, and figures are of the calibration data"
    return describe(data.selection)


def _kept(model: ir.Model) -> frozenset[int]:
    """Positions of the nodes that keep 8 bits among the mapped ones."""
    return frozenset(index for index, node in enumerate(mapped_nodes(model)) if KEPT.get(node) is not None)


def _place(
    model: ir.Model, chip: Chip, widths: Sequence[NodeWidth], max_crossbars: int | None = None
) -> tuple[Placement, bool]:
    nodes = [MAPPED.require(node) for node in mapped_nodes(model)]
    matrices = {node.name: Matrix.of(node.layout, bits) for node, bits in zip(nodes, widths, strict=True)}
    return place_anyway(matrices, chip, chip.sharing, max_crossbars)


def _room(model: ir.Model, chip: Chip, config: OptimizeConfig, kept: frozenset[int]) -> str:
    """What the smallest widths take of what there is.

    Raises:
        DoesNotFitError: They do not fit, and no kernel may be dropped.
    """
    settings = replace(config.search_settings, kept=kept)
    smallest = settings.bits(len(mapped_nodes(model)), settings.weight_bits[0], None).weights
    placed, fits = _place(model, chip, smallest, config.max_crossbars)
    short = shortage(chip, placed.crossbars_by_type)
    over = not fits or placed.crossbars > (config.max_crossbars or placed.crossbars)
    if not settings.drops:
        alone = "" if fits else too_large_alone(placed.matrices, chip)
        goal = goal_on(config, chip)
        check_room(chip, goal, settings, need=placed.crossbars, fits=fits, short=short, alone=alone)
    taken = "1 crossbar" if placed.crossbars == 1 else f"{placed.crossbars} crossbars"
    text = f"{settings.weight_bits[0]} bits for every kernel take {taken}"
    # How many kernels can go is known only when their losses are.
    return (
        f"{text}, more than there are: kernels have to be dropped, or it will not fit" if over else f"{text}, which fit"
    )


def _widths(config: OptimizeConfig, kept: Sequence[str]) -> str:
    """What weights and activations get, in a few words."""

    def words(bits: tuple[int, int] | None) -> str:
        if bits is None:
            return "float"
        return f"{bits[0]} bits" if bits[0] == bits[1] else f"{bits[0]} to {bits[1]} bits, searched"

    settings = config.search_settings
    text = f"weights {words(settings.weight_bits)}; activations {words(settings.activation_bits)}"
    return text + (f"; kept at {settings.kept_weight_bits}: {', '.join(kept)}" if kept else "")
