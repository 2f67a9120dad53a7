"""One inference alone and inferences in a pipeline: small graphs by hand, random ones by simulation."""

from __future__ import annotations

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.schedule import Stage, pipeline, sequential, stage_graph


def test_a_chain_by_hand() -> None:
    chain = [Stage("a", 5), Stage("b", 9, ("a",)), Stage("c", 2, ("b",))]
    alone, piped = sequential(chain), pipeline(chain)
    assert (alone.cycles, alone.critical_path) == (16, ("a", "b", "c"))
    assert (piped.interval, piped.latency) == (9, 16)
    assert piped.starts == {"a": 0, "b": 5, "c": 14 % 9}


def test_branches_run_in_parallel_unless_they_are_rivals() -> None:
    free = [Stage("a", 1), Stage("b", 10, ("a",)), Stage("c", 4, ("a",)), Stage("d", 1, ("b", "c"))]
    assert sequential(free).cycles == 12
    assert sequential(free).critical_path == ("a", "b", "d")
    assert pipeline(free).interval == 10
    rivals = [free[0], Stage("b", 10, ("a",), ("c",)), Stage("c", 4, ("a",), ("b",)), free[3]]
    assert sequential(rivals).cycles == 16
    assert sequential(rivals).critical_path == ("a", "b", "c", "d")
    assert pipeline(rivals).interval == 14


def test_rivals_without_common_rivals_share_the_interval() -> None:
    # b stands against a and c, which may compute together.
    stages = [Stage("a", 6, (), ("b",)), Stage("b", 5, ("a",), ("a", "c")), Stage("c", 6, ("b",), ("b",))]
    found = pipeline(stages)
    assert found.interval == 11
    # a at 0 to 6, b at 6 to 11, c at its place 0 of the next interval, 11 to 17.
    assert found.starts == {"a": 0, "b": 6, "c": 0}
    assert found.latency == 17


def test_nothing_takes_no_time() -> None:
    assert (sequential([]).cycles, sequential([]).critical_path, pipeline([]).interval) == (0, (), 0)
    empty = [Stage("a", 0), Stage("b", 0, ("a",), ("a",))]
    assert (sequential(empty).cycles, pipeline(empty).interval, pipeline(empty).latency) == (0, 0, 0)


@st.composite
def stage_lists(draw: st.DrawFn) -> list[Stage]:
    count = draw(st.integers(1, 8))
    pairs = [(i, j) for j in range(count) for i in range(j)]
    edges = set(draw(st.lists(st.sampled_from(pairs), max_size=10))) if pairs else set()
    against = set(draw(st.lists(st.sampled_from(pairs), max_size=10))) if pairs else set()
    cycles = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    return [
        Stage(
            f"s{n}",
            cycles[n],
            tuple(f"s{i}" for i, j in sorted(edges) if j == n),
            tuple(f"s{i + j - n}" for i, j in sorted(against) if n in (i, j)),
        )
        for n in range(count)
    ]


@given(stage_lists())
def test_the_critical_path_is_a_longest_path(stages: list[Stage]) -> None:
    graph = stage_graph(stages)
    assert nx.is_directed_acyclic_graph(graph)
    found = sequential(stages)
    length = {stage.name: stage.cycles for stage in stages}
    assert sum(length[name] for name in found.critical_path) == found.cycles
    assert all(graph.has_edge(*pair) for pair in zip(found.critical_path, found.critical_path[1:], strict=False))
    longest = nx.dag_longest_path_length(
        nx.DiGraph([(("in", u), ("out", u), {"weight": length[u]}) for u in graph]
                   + [(("out", u), ("in", v), {"weight": 0}) for u, v in graph.edges])
    )  # fmt: skip
    assert found.cycles == longest


@given(stage_lists())
def test_a_pipeline_can_be_kept_up(stages: list[Stage]) -> None:
    found = pipeline(stages)
    slowest = max(stage.cycles for stage in stages)
    assert slowest <= found.interval <= sum(stage.cycles for stage in stages)
    if not any(stage.rivals for stage in stages):
        assert found.interval == slowest
    assert found.latency <= (len(stages) + 1) * max(found.interval, 1)
    if not found.interval:
        return
    # In steady state, every cycle of the interval has no two rivals at work.
    busy = {
        stage.name: {(found.starts[stage.name] + n) % found.interval for n in range(stage.cycles)} for stage in stages
    }
    for stage in stages:
        assert len(busy[stage.name]) == stage.cycles
        for rival in stage.rivals:
            assert not busy[stage.name] & busy[rival], (stage, rival)


@given(stage_lists())
def test_a_pipeline_keeps_the_order_of_data(stages: list[Stage]) -> None:
    # Replay one inference by the starts alone: each stage at its first start after its inputs.
    found = pipeline(stages)
    if not found.interval:
        return
    ends: dict[str, int] = {}
    begins: dict[str, int] = {}
    for stage in stages:
        ready = max((ends[name] for name in stage.after), default=0)
        begins[stage.name] = ready + (found.starts[stage.name] - ready) % found.interval
        ends[stage.name] = begins[stage.name] + stage.cycles
    assert max(ends.values()) - min(begins.values()) == found.latency
