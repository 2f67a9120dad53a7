"""When stages compute: one inference at a time, and inferences overlapped in a pipeline.

A stage is one mapped node for one inference. It starts when all stages that it depends on have ended; that a stage
could start on the first rows of its input, as in ISAAC, is not modelled. Rivals, stages that share wordlines or
bitlines of a crossbar, never compute at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import networkx as nx

__all__ = ["Pipeline", "Sequential", "Stage", "pipeline", "sequential", "stage_graph"]


@dataclass(frozen=True)
class Stage:
    """One mapped node.

    Attributes:
        name: Its name.
        cycles: What it takes for one inference.
        after: Stages that it depends on.
        rivals: Stages that cannot compute at the same time.
    """

    name: str
    cycles: int
    after: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sequential:
    """One inference alone.

    Attributes:
        cycles: From the first stage's start to the last one's end.
        critical_path: Stages that decide it, each waiting for the one before: for its result or its crossbars.
    """

    cycles: int
    critical_path: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """Inferences overlapped: each stage computes once in every interval, for one inference after the other.

    Attributes:
        interval: Cycles from one inference to the next.
        starts: Cycle within the interval at which each stage starts; without rivals it may run on into the next one.
        latency: Cycles from the start of an inference to its end.
    """

    interval: int
    starts: Mapping[str, int]
    latency: int


def stage_graph(stages: Sequence[Stage]) -> nx.DiGraph[str]:
    """Graph of the stages with an edge for each dependency and, by order, between rivals.

    Source: the disjunctive graph of job-shop scheduling (Roy and Sussmann, 1964), its disjunctions settled by the
    order of `stages`.

    Args:
        stages: In a valid order of execution.

    Returns:
        An acyclic graph whose nodes carry `cycles`.
    """
    # Large, and whoever only quantizes needs no schedule.
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for stage in stages:
        before = {name for name in (*stage.after, *stage.rivals) if name in graph}
        graph.add_node(stage.name, cycles=stage.cycles)
        graph.add_edges_from((name, stage.name) for name in sorted(before))
    return graph


def sequential(stages: Sequence[Stage]) -> Sequential:
    """Longest path through `stage_graph`: independent stages in parallel unless they are rivals.

    Args:
        stages: In a valid order of execution.
    """
    graph = stage_graph(stages)
    ends: dict[str, int] = {}
    waited_for: dict[str, str | None] = {}
    for stage in stages:
        last = max(graph.predecessors(stage.name), key=ends.__getitem__, default=None)
        waited_for[stage.name] = last
        ends[stage.name] = stage.cycles + (0 if last is None else ends[last])
    at: str | None = max(ends, key=ends.__getitem__, default=None)
    cycles = 0 if at is None else ends[at]
    path = []
    while at is not None:
        path.append(at)
        at = waited_for[at]
    return Sequential(cycles, tuple(reversed(path)))


def pipeline(stages: Sequence[Stage]) -> Pipeline:
    """A pipeline in which every stage computes once an interval.

    Derived here. Without rivals the slowest stage is the interval, which no pipeline of these stages can beat. Rivals
    get disjoint parts of the interval: stages by falling cycles, each at the first place that no rival takes (first fit
    for interval colouring); what this gives can be kept up by construction, and may be longer than the shortest one.

    Args:
        stages: In a valid order of execution.
    """
    places: dict[str, int] = {}
    length = {stage.name: stage.cycles for stage in stages}
    for stage in sorted(stages, key=lambda item: -item.cycles):
        taken = sorted((places[name], places[name] + length[name]) for name in stage.rivals if name in places)
        places[stage.name] = _first_gap(taken, stage.cycles)
    interval = max((places[name] + length[name] for name in places), default=0)
    begins = _begins(stages, places, interval)
    ends = [begins[stage.name] + stage.cycles for stage in stages]
    latency = max(ends, default=0) - min(begins.values(), default=0)
    return Pipeline(interval, {name: start % interval if interval else 0 for name, start in begins.items()}, latency)


def _first_gap(taken: Sequence[tuple[int, int]], length: int) -> int:
    """First start at which a piece of that length meets none of the intervals, which are sorted."""
    start = 0
    for first, last in taken:
        if start + length <= first:
            break
        start = max(start, last)
    return start


def _begins(stages: Sequence[Stage], places: Mapping[str, int], interval: int) -> dict[str, int]:
    """When an inference starts each stage: at once where it has no rivals, else at its place of the next interval."""
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    for stage in stages:
        ready = max((ends[name] for name in stage.after), default=0)
        if stage.rivals and interval:
            place = places[stage.name]
            ready = place + max(0, -(-(ready - place) // interval)) * interval
        begins[stage.name] = ready
        ends[stage.name] = ready + stage.cycles
    return begins
