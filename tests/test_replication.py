"""Copies of the slowest nodes: the choice against brute force, the placement against every invariant."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raqu_onnx.errors import ConfigError
from raqu_onnx.hardware import Chip, CrossbarType, load_chip
from raqu_onnx.manifest import digest_of, read_manifest
from raqu_onnx.placement import DoesNotFitError, place
from raqu_onnx.replication import Job, balance, replicate, require_budget
from raqu_onnx.tiling import Matrix

Cli = Callable[..., Any]

jobs = st.lists(
    st.builds(
        Job, mvms=st.integers(0, 12), step=st.integers(0, 3), cost=st.tuples(st.integers(0, 2), st.integers(1, 2))
    ),
    min_size=1,
    max_size=3,
)
rooms = st.none() | st.integers(0, 12)


def fits(work: list[Job], copies: list[int], free: list[int | None], total: int | None, sizes: list[int]) -> bool:
    used = [sum((n - 1) * job.cost[t] for job, n in zip(work, copies, strict=True)) for t in (0, 1)]
    within = all(room is None or have <= room for have, room in zip(used, free, strict=True))
    return within and (total is None or sum(n * s for n, s in zip(used, sizes, strict=True)) <= total)


def slowest(work: list[Job], copies: list[int]) -> int:
    return max(job.cycles(n) for job, n in zip(work, copies, strict=True))


@settings(max_examples=300)
@given(jobs, st.lists(rooms, min_size=2, max_size=2), rooms, st.lists(st.integers(1, 2), min_size=2, max_size=2))
def test_no_choice_within_the_room_is_faster(
    work: list[Job], free: list[int | None], total: int | None, sizes: list[int]
) -> None:
    found = balance(work, free, total, sizes)
    assert fits(work, found, free, total, sizes)
    choices = itertools.product(*(range(1, max(job.mvms, 1) + 1) for job in work))
    best = min(slowest(work, list(copies)) for copies in choices if fits(work, list(copies), free, total, sizes))
    assert slowest(work, found) == best
    # None of them is idle: with one copy less, its stage would be slower than all.
    for job, count in zip(work, found, strict=True):
        assert count == 1 or job.cycles(count - 1) > best


def test_copies_by_hand() -> None:
    # 12, 6 and 4 cycles. To get below 12, a needs 2 copies (6 cycles); below 6, a needs 3 (4) and b 2 (3); below 4,
    # a needs 4 (3) and c 2 (2): 1, 3 and 5 more slots. Those that do not help the slowest stage stay free.
    work = [Job(12, 1, (1,)), Job(6, 1, (1,)), Job(4, 1, (1,))]
    assert balance(work, [5], None, [1]) == [4, 2, 2]
    assert balance(work, [4], None, [1]) == [3, 2, 1]
    assert balance(work, [1], None, [1]) == [2, 1, 1]
    assert balance(work, [0], None, [1]) == [1, 1, 1]
    assert balance(work, [None], None, [1]) == [12, 6, 4]
    # Pairs of arrays: a slot takes two crossbars of the total.
    assert balance(work, [None], 5, [2]) == [2, 1, 1]
    assert balance(work, [None], 6, [2]) == [3, 2, 1]


def chip(sharing: str = "exclusive", count: int | None = 40, **changes: Any) -> Chip:
    main = CrossbarType(name="main", rows=32, cols=32, cell_bits=2, count=count)
    content = {"schema_version": 1, "name": "test", "encoding": "offset", "sharing": sharing, "dac_bits": 1}
    return Chip.model_validate({**content, "crossbars": (main,), **changes})


MATRICES = {"wide": Matrix(1, 40, np.full((1, 8), 8)), "small": Matrix(1, 8, np.full((1, 4), 8))}
MVMS: dict[str, int | None] = {"wide": 60, "small": 16}
INPUTS: dict[str, int | None] = {"wide": 8, "small": 8}


def test_free_crossbars_are_filled() -> None:
    # wide takes 2 crossbars (40 rows), small 1. 60 and 16 MVMs on 40 crossbars: T MVMs a copy need
    # 2 ceil(60 / T) + ceil(16 / T) crossbars: T = 4: 30 + 4 = 34; T = 3: 40 + 6 = 46 > 40.
    found = replicate(MATRICES, chip(), MVMS, INPUTS, "chip")
    assert found.replicas == {"wide": 15, "small": 4}
    assert found.crossbars == 34
    assert found.programmed_cells == 15 * 40 * 8 * 4 + 4 * 8 * 4 * 4
    assert found.weight_bits == 15 * 40 * 8 * 8 + 4 * 8 * 4 * 8
    assert replicate(MATRICES, chip(), MVMS, INPUTS, 3).replicas == {"wide": 1, "small": 1}
    assert replicate(MATRICES, chip(count=None), MVMS, INPUTS, 46).replicas == {"wide": 20, "small": 6}


def test_copies_lie_in_crossbars_of_their_own() -> None:
    found = replicate(MATRICES, chip("time"), MVMS, INPUTS, 12)
    assert found.sharing == "diagonal"
    assert found.crossbars <= 12
    owners: dict[int, set[tuple[str, int]]] = {}
    for placed in found.blocks:
        owners.setdefault(placed.crossbar, set()).add((placed.node, placed.replica))
    assert sorted(owners) == list(range(found.crossbars))
    shared = [who for who in owners.values() if len(who) > 1]
    assert all(replica == 0 for who in shared for _, replica in who)


def test_nodes_that_would_wait_in_one_crossbar_lie_apart() -> None:
    main = CrossbarType(name="main", rows=32, cols=32, cell_bits=2, count=12, rows_active=8)
    limited = chip("time", crossbars=(main,))
    found = replicate(MATRICES, limited, MVMS, INPUTS, "chip")
    assert found.sharing == "exclusive"
    # 40 rows are blocks of 32 and 8 wordlines: 4 turns for the larger one; 8 rows are 1 turn.
    assert found.replicas == {"wide": 5, "small": 1}


def test_several_types_keep_their_counts() -> None:
    types = tuple(CrossbarType(name=f"t{n}", rows=n, cols=n, cell_bits=2, count=n // 4) for n in (16, 32))
    found = replicate(MATRICES, chip(crossbars=types, count=None), MVMS, INPUTS, "chip")
    assert all(used <= kind.count for used, kind in zip(found.crossbars_by_type, types, strict=True) if kind.count)
    # The first copies take 3 of 4 small crossbars and 1 of 8 large ones: wide lies on both. Other copies of it take two
    # large ones: three fit into 7, which leaves 1 for small. Copies of 60 and 16 MVMs compute 15 and 8 of them.
    assert {placed.crossbar_type for placed in found.blocks if placed.node == "wide" and not placed.replica} == {0, 1}
    assert found.replicas == {"wide": 4, "small": 2}
    tenants: dict[tuple[int, int], set[tuple[str, int]]] = {}
    for placed in found.blocks:
        tenants.setdefault((placed.crossbar_type, placed.crossbar), set()).add((placed.node, placed.replica))
    assert all(len(who) == 1 for who in tenants.values() if any(replica for _, replica in who))
    assert len(tenants) == found.crossbars


def test_a_copy_lies_on_several_types_where_one_alone_has_too_few() -> None:
    types = (
        CrossbarType(name="low", rows=16, cols=32, cell_bits=2, count=2),
        CrossbarType(name="high", rows=32, cols=32, cell_bits=2, count=2),
    )
    found = replicate({"wide": Matrix(1, 40, np.full((1, 8), 8))}, chip(crossbars=types), MVMS, INPUTS, "chip")
    assert found.replicas == {"wide": 2}
    assert found.crossbars_by_type == (2, 2)
    assert found.lower_bound_cells <= found.allocated_cells


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ConfigError, match=r"generic has as many crossbars as needed.*--replicate 200"):
        require_budget("chip", load_chip("generic"))
    require_budget("chip", load_chip("isaac"))
    require_budget(5, load_chip("generic"))
    with pytest.raises(ConfigError, match="cycles of node small are unknown: its shapes are open"):
        replicate(MATRICES, chip(), {**MVMS, "small": None}, INPUTS, "chip")
    with pytest.raises(ConfigError, match="cycles of node wide are unknown: its input stays float"):
        replicate(MATRICES, chip(), MVMS, {**INPUTS, "wide": None}, "chip")
    with pytest.raises(DoesNotFitError, match="takes 3 crossbars; allow more than --replicate 2"):
        replicate(MATRICES, chip(), MVMS, INPUTS, 2)
    # Packed in time both share two crossbars; side by side or corner to corner they need three.
    tight = chip("time", count=2)
    wide = {"a": Matrix(1, 32, np.full((1, 6), 8)), "b": Matrix(1, 32, np.full((1, 2), 8)), "c": MATRICES["small"]}
    assert place(wide, tight).crossbars <= 2
    with pytest.raises(DoesNotFitError, match=r"share rows or columns.*takes 3 crossbars where it has 2 on chip test"):
        replicate(wide, tight, dict.fromkeys(wide, 4), dict.fromkeys(wide, 8), "chip")


# ------------------------------------------------------------------------------------------------------ whole runs

RUN = ("optimize", "model.onnx", "--calibration", "calibration.npz", "--weight-bits", "3", "--weight-method", "nearest")
ENCODINGS = {
    "offset": 'encoding = "offset"\nsharing = "time"',
    "unit column": 'encoding = "offset"\noffset_sum = "unit-column"\nflip = true\nsharing = "exclusive"',
    "pairs": 'encoding = "differential-column"\npolarity_arrays = "pair"\nsharing = "exclusive"',
    "rows": 'encoding = "differential-row"\nsharing = "diagonal"',
    "twos-complement": 'encoding = "twos-complement"\nsharing = "time"\nsplit_slices = true',
}


def write_chip(workspace: Path, encoding: str, count: str = "count = 60") -> None:
    old = (workspace / "chip.toml").read_text()
    head, brackets, rest = old.partition("[[")
    kept = [line for line in head.splitlines() if not line.startswith(("encoding", "sharing"))]
    text = "\n".join([*kept, ENCODINGS[encoding], brackets + rest + count])
    (workspace / "chip.toml").write_text(text + "\n")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_copy_passes_every_check(cli: Cli, workspace: Path, encoding: str) -> None:
    write_chip(workspace, encoding)
    ran = cli(*RUN, "--hw", "chip.toml", "--replicate", "chip", "--cells", "-o", "out", "--format", "json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    manifest = read_manifest("out/manifest.json")
    copies = {node.name: max(p.replica for p in node.placements) + 1 for node in manifest.nodes}
    assert report["replicas"] == copies
    assert max(copies.values()) > 1
    single, ours = report["figures"][-2:]
    assert (single["label"], ours["label"]) == ("ours, one copy", "ours")
    assert ours["cost"]["interval_cycles"] < single["cost"]["interval_cycles"]
    assert single["crossbars"] < ours["crossbars"] <= 60
    assert ours["cost"]["interval_cycles"] == max(report["cycles"].values())
    assert cli("validate", "out").code == 0
    for node, count in copies.items():
        assert f'"replicas": {count}' in next(
            text for text in _tilings(workspace / "out" / "model.onnx") if text.startswith(node)
        )


def _tilings(path: Path) -> list[str]:
    import onnx

    graph = onnx.load(path).graph
    return [f"{n.name} {p.value}" for n in graph.node for p in n.metadata_props if p.key == "raqu.tiling"]


def test_a_damaged_copy_is_caught(cli: Cli, workspace: Path) -> None:
    write_chip(workspace, "unit column")
    assert cli(*RUN, "--hw", "chip.toml", "--replicate", "chip", "--cells", "-o", "out").code == 0
    path = workspace / "out" / "manifest.json"
    sound = path.read_text()
    for damage, rule in (
        (lambda entries: entries[-1].update(replica=entries[-1]["replica"] + 1), "placement.coverage"),
        (lambda entries: entries[-1].update(weight_rows=[0, 1]), "placement.shape"),
        (lambda entries: entries[-1].update(crossbar=0), "placement.sharing"),
        (lambda entries: entries[-1].update(partial_sum=0), "placement.partial-sums"),
    ):
        data = json.loads(sound)
        damage(data["nodes"][0]["placements"])
        data["digest"] = digest_of(data)
        path.write_text(json.dumps(data))
        checks = {
            check["name"]: check for check in json.loads(cli("validate", "out", "--format", "json").out)["checks"]
        }
        assert checks[rule]["passed"] is False, (rule, checks)


def test_no_room_for_copies_is_a_warning(cli: Cli, workspace: Path) -> None:
    ran = cli(*RUN, "--hw", "chip.toml", "--replicate", "2", "-o", "out", "--format", "json")
    assert ran.code == 0
    report = json.loads(ran.out)
    (why,) = (text for text in report["warnings"] if text.startswith("no copies"))
    taken = re.fullmatch(
        r"no copies were made: all nodes compute at once then, so that no two share rows or columns of a crossbar; so "
        r"placed, one copy of each takes (\d+) crossbars; allow more than --replicate 2",
        why,
    )
    assert taken is not None, why
    assert int(taken[1]) > 2
    assert set(report["replicas"].values()) == {1}
    assert [row["label"] for row in report["figures"]].count("ours") == 1
    assert workspace.is_dir()


def test_a_chip_without_room_for_one_copy_of_each_says_how_many_are_short(cli: Cli, workspace: Path) -> None:
    write_chip(workspace, "offset", "count = 4")
    ran = cli(*RUN, "--hw", "chip.toml", "--replicate", "chip", "-o", "out")
    assert ran.code == 0, ran.err
    said = re.search(r"so placed, one copy of each takes (\d+) crossbars where it has 4 on chip small", ran.err)
    assert said is not None, ran.err
    assert int(said[1]) > 4


def test_the_bound_is_one_number_everywhere(cli: Cli, workspace: Path) -> None:
    write_chip(workspace, "offset")
    ran = cli(*RUN, "--hw", "chip.toml", "--replicate", "30", "-o", "out")
    shown = cli("manifest", "show", "out").out
    report = json.loads((workspace / "out" / "report.json").read_text())
    totals = json.loads((workspace / "out" / "manifest.json").read_text())["totals"]
    assert max(report["replicas"].values()) > 1
    assert report["lower_bound"] == totals["lower_bound"]
    gap = totals["cell_utilization"]["denominator"] / totals["lower_bound_cells"] - 1
    assert report["gap"] == pytest.approx(gap)
    line = f"{report['lower_bound']} crossbars; gap of allocated cells {gap:.1%}"
    assert f"lower bound for these bits and copies: {line}" in ran.out
    assert f"lower bound: {line}" in shown


def test_the_table_shows_copies(cli: Cli, workspace: Path) -> None:
    write_chip(workspace, "offset")
    ran = cli(*RUN, "--hw", "chip.toml", "--replicate", "30", "-o", "out")
    assert ran.code == 0
    assert "copies" in ran.out.splitlines()[1]
    assert "ours, one copy" in ran.out


@pytest.mark.parametrize("value", ["0", "-1", "model.onnx", "1.5", "true"])
def test_a_wrong_number_is_refused(refused: Callable[..., str], workspace: Path, value: str) -> None:
    refused(workspace, (*RUN, "--replicate", value), "replicate", value)


def test_a_chip_without_a_count_needs_a_number(refused: Callable[..., str], workspace: Path) -> None:
    refused(workspace, (*RUN, "--replicate", "chip"), "--replicate", "generic", "--replicate 200")
    refused(workspace, (*RUN, "--replicate", "chip", "--dry-run"), "--replicate", "generic")
    refused(workspace, (*RUN, "--replicate", "9", "--activation-bits", "float"), "--replicate: with float activations")
