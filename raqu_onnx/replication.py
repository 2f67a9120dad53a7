"""Copies of the nodes that limit a pipeline's throughput, on crossbars that the model leaves free.

Every copy has crossbars of its own, so that copies never wait for each other.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from raqu_onnx.cost import figures_of, input_slices, node_cycles, read_cycles
from raqu_onnx.errors import ChipError, ConfigError
from raqu_onnx.model_cost import block_regions
from raqu_onnx.placement import DoesNotFitError, PlacedBlock, Placement, PlacementMethod, place
from raqu_onnx.shortage import shortage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from raqu_onnx.hardware import Chip, Sharing
    from raqu_onnx.tiling import Matrix

__all__ = ["Budget", "Job", "balance", "replicate", "require_budget"]

#: Most crossbars in all, or as many as the chip has.
Budget = int | Literal["chip"]

# What copies ask of a placement, by its sharing mode.
_ASKED: dict[str, str] = {
    "diagonal": "all nodes compute at once then, so that no two share rows or columns of a crossbar; so placed",
    "exclusive": "all nodes compute at once then, so that no two share a crossbar; so placed",
}


@dataclass(frozen=True)
class Job:
    """A stage whose work copies can share.

    Attributes:
        mvms: MVMs of one inference.
        step: Cycles of one MVM.
        cost: Slots that one copy takes, by crossbar type.
    """

    mvms: int
    step: int
    cost: tuple[int, ...]

    def cycles(self, copies: int) -> int:
        """Cycles of one inference with so many copies."""
        return node_cycles(self.mvms, copies, 1, self.step)

    def copies_within(self, cycles: int) -> int:
        """Fewest copies that take no more than so many cycles, which are at least `step`."""
        return max(1, -(-self.mvms // (cycles // self.step))) if self.step and self.mvms else 1


def balance(jobs: Sequence[Job], free: Sequence[int | None], total: int | None, sizes: Sequence[int]) -> list[int]:
    """Copies of each stage that make the slowest stage as fast as the free slots allow.

    Greedy: the slowest stage gets what makes it faster, until that no longer fits. This is optimal (derived here). Let
    T be what the greedy ends with, and suppose that some choice within the room takes at most T' < T. Before each of
    its steps the greedy's slowest stage takes at least T > T', so that it has fewer copies than that choice gives it; a
    step goes to the fewest copies that are faster at all, which the choice has as well. So the greedy never holds more
    copies of any stage than the choice does, its next step stays within the choice too, and must fit: a contradiction.

    Args:
        jobs: The stages, one copy each to begin with.
        free: Slots left by crossbar type, None for any number.
        total: Crossbars left over all types, None for any number.
        sizes: Crossbars that a slot of each type stands for.

    Returns:
        Copies by stage, no more than the result needs.
    """
    copies = [1] * len(jobs)
    left, crossbars = list(free), total
    heap = [(-job.cycles(1), index) for index, job in enumerate(jobs)]
    heapq.heapify(heap)
    while heap:
        slowest, index = heap[0]
        job = jobs[index]
        if -slowest <= job.step:
            break  # One MVM a copy: no copy makes it faster.
        more = job.copies_within(-slowest - job.step) - copies[index]
        need = [more * slots for slots in job.cost]
        arrays = sum(slots * size for slots, size in zip(need, sizes, strict=True))
        short = any(have is not None and slots > have for slots, have in zip(need, left, strict=True))
        if short or (crossbars is not None and arrays > crossbars):
            break
        left = [None if have is None else have - slots for have, slots in zip(left, need, strict=True)]
        crossbars = None if crossbars is None else crossbars - arrays
        copies[index] += more
        heapq.heapreplace(heap, (-job.cycles(copies[index]), index))
    slowest_cycles = max((job.cycles(count) for job, count in zip(jobs, copies, strict=True)), default=0)
    return [job.copies_within(slowest_cycles) for job in jobs]


def require_budget(budget: Budget | None, chip: Chip, *, float_inputs: bool = False) -> None:
    """Make sure that it is known how many crossbars copies may use, and that crossbars can run the model.

    Raises:
        ConfigError: The chip has no count and none is given, or activations stay float.
    """
    if budget is not None and float_inputs:
        raise ConfigError("--replicate: with float activations no crossbar runs the model; give --activation-bits 8")
    if budget == "chip" and any(kind.count is None for kind in chip.crossbars):
        raise ConfigError(
            f"--replicate: chip {chip.name} has as many crossbars as needed; give a number, as in --replicate 200"
        )


def replicate(
    matrices: Mapping[str, Matrix],
    chip: Chip,
    mvms: Mapping[str, int | None],
    activation_bits: Mapping[str, int | None],
    budget: Budget,
    *,
    method: PlacementMethod = "fast",
) -> Placement:
    """Place a model so that all nodes can compute at once, and fill free crossbars with copies of the slowest ones.

    Under `time` sharing nodes that share rows or columns wait for each other, and no copy helps that: the placement
    here is `diagonal` instead, which such a chip can do as well, or `exclusive` where nodes in one crossbar would wait
    for its ADCs or for its turn to drive wordlines.

    Args:
        matrices: Weights by node name.
        chip: The chip.
        mvms: MVMs per group and sample, by node.
        activation_bits: Bits of the inputs, by node.
        budget: Most crossbars in all; one copy of each stays within them where that can be done, see `place`.
        method: How the first copies are placed, see `place`.

    Returns:
        The placement with its copies.

    Raises:
        ConfigError: MVMs or the bits of an input are unknown.
        DoesNotFitError: Without sharing rows and columns one copy of each node takes more crossbars than there are.
    """
    base = _at_once(matrices, chip, None if budget == "chip" else budget, method)
    if budget != "chip" and base.crossbars > budget:
        raise DoesNotFitError(
            f"{_ASKED[base.sharing]}, one copy of each takes {base.crossbars} crossbars; "
            f"allow more than --replicate {budget}"
        )
    own = _blocks_by_node(base)
    sizes = [shape.encoding.arrays_per_placement for shape in base.geometries]
    free = [
        None if kind.count is None else kind.count // size - used
        for kind, size, used in zip(chip.crossbars, sizes, base.slots, strict=True)
    ]
    best: tuple[tuple[int, int], Placement] | None = None
    for copied in _ways(matrices, own, chip):
        jobs = [_job(name, own[name], base, mvms[name], activation_bits[name], copy) for name, copy in copied.items()]
        counts = balance(jobs, free, None if budget == "chip" else budget - base.crossbars, sizes)
        found = _with_copies(base, own, copied, dict(zip(own, counts, strict=True)))
        slowest = max((job.cycles(count) for job, count in zip(jobs, counts, strict=True)), default=0)
        if best is None or (slowest, found.allocated_cells) < best[0]:
            best = (slowest, found.allocated_cells), found
    return base if best is None else best[1]


def _at_once(
    matrices: Mapping[str, Matrix], chip: Chip, max_crossbars: int | None, method: PlacementMethod
) -> Placement:
    """One copy of each node, so placed that all can compute at once."""
    limited = any(figures_of(chip, kind).is_limited for kind in chip.crossbars)
    mode: Sharing = "exclusive" if chip.sharing == "exclusive" or limited else "diagonal"
    try:
        return place(matrices, chip, sharing=mode, max_crossbars=max_crossbars, method=method)
    except DoesNotFitError as error:
        need = place(matrices, chip, sharing=mode, ignore_counts=True)
        have = sum(kind.count or 0 for kind in chip.crossbars)
        short = shortage(chip, need.crossbars_by_type) or f"{need.crossbars} crossbars where it has {have}"
        raise DoesNotFitError(f"{_ASKED[mode]}, one copy of each takes {short} on chip {chip.name}") from error


def _blocks_by_node(base: Placement) -> dict[str, list[PlacedBlock]]:
    found: dict[str, list[PlacedBlock]] = {name: [] for name in base.matrices}
    for placed in base.blocks:
        found[placed.node].append(placed)
    return found


_Copies = dict[str, list[PlacedBlock]]


def _ways(matrices: Mapping[str, Matrix], own: Mapping[str, Sequence[PlacedBlock]], chip: Chip) -> Iterator[_Copies]:
    """One copy of each node: on the types of the first one, and with all that can on one type of which some is left."""
    same = {name: _alone(matrices[name], blocks, chip) for name, blocks in own.items()}
    yield same
    for kind in range(len(chip.crossbars) if len(chip.crossbars) > 1 else 0):
        moved = {name: _on_type(matrices[name], blocks, chip, kind) for name, blocks in own.items()}
        yield {name: same[name] if copy is None else copy for name, copy in moved.items()}


def _on_type(matrix: Matrix, blocks: Sequence[PlacedBlock], chip: Chip, kind: int) -> list[PlacedBlock] | None:
    """One copy of a node on one type, None where its cells hold other bits or a kernel is too wide."""
    crossbar = chip.crossbars[kind]
    if not blocks or crossbar.cell_bits != chip.crossbars[blocks[0].crossbar_type].cell_bits:
        return None
    only = chip.model_copy(update={"crossbars": (crossbar,), "hierarchy": None})
    try:
        found = place({blocks[0].node: matrix}, only, sharing="exclusive", ignore_counts=True)
    except ChipError:
        return None
    return [replace(placed, crossbar_type=kind) for placed in found.blocks]


def _alone(matrix: Matrix, blocks: Sequence[PlacedBlock], chip: Chip) -> list[PlacedBlock]:
    """One copy of a node in crossbars of its own, numbered from 0 within each type."""
    kinds = {placed.crossbar_type for placed in blocks}
    found = _on_type(matrix, blocks, chip, kinds.pop()) if len(kinds) == 1 else None
    if found is not None:
        return found
    # On several types: as the first copy lies, without what it shares its crossbars with.
    numbers: dict[tuple[int, int], int] = {}
    counts: Counter[int] = Counter()
    for placed in blocks:
        key = placed.crossbar_type, placed.crossbar
        if key not in numbers:
            numbers[key] = counts[placed.crossbar_type]
            counts[placed.crossbar_type] += 1
    return [replace(placed, crossbar=numbers[placed.crossbar_type, placed.crossbar]) for placed in blocks]


def _slots(blocks: Sequence[PlacedBlock], types: int) -> tuple[int, ...]:
    used = {(placed.crossbar_type, placed.crossbar) for placed in blocks}
    return tuple(sum(kind == index for kind, _ in used) for index in range(types))


def _job(
    name: str,
    blocks: Sequence[PlacedBlock],
    base: Placement,
    mvms: int | None,
    activation_bits: int | None,
    copy: Sequence[PlacedBlock],
) -> Job:
    """The stage of one node; a copy never takes longer than the first one, which may share its crossbars."""
    if mvms is None or activation_bits is None:
        what = "its shapes are open" if mvms is None else "its input stays float"
        raise ConfigError(f"--replicate: the cycles of node {name} are unknown: {what}")
    per_type = [shape.encoding.arrays_per_placement for shape in base.geometries]
    arrays = [figures_of(base.chip, kind) for kind in base.chip.crossbars]
    reads = max(read_cycles(block_regions(item, per_type), arrays) for item in (blocks, copy))
    return Job(mvms, input_slices(activation_bits, base.chip.dac_bits) * reads, _slots(copy, len(arrays)))


def _with_copies(
    base: Placement,
    own: Mapping[str, Sequence[PlacedBlock]],
    copied: Mapping[str, Sequence[PlacedBlock]],
    counts: Mapping[str, int],
) -> Placement:
    slots = list(base.slots)

    def blocks() -> Iterator[PlacedBlock]:
        for name, first in own.items():
            yield from first
            for number in range(1, counts[name]):
                for placed in copied[name]:
                    yield replace(placed, crossbar=placed.crossbar + slots[placed.crossbar_type], replica=number)
                for kind, count in enumerate(_slots(copied[name], len(slots))):
                    slots[kind] += count

    return replace(base, blocks=tuple(blocks()), slots=tuple(slots))
