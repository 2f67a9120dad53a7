"""A chip that is too small: parts of consecutive nodes, each within its counts, and what programming them costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raqu_onnx.errors import ConfigError
from raqu_onnx.hardware import Chip, CrossbarType
from raqu_onnx.manifest import digest_of, read_manifest
from raqu_onnx.partitioning import place_in_parts, require_parts, without_counts
from raqu_onnx.placement import DoesNotFitError, place
from raqu_onnx.tiling import Matrix

Cli = Callable[..., Any]


def chip(count: int = 4, sharing: str = "exclusive", **changes: Any) -> Chip:
    main = CrossbarType(name="main", rows=16, cols=16, cell_bits=2, count=count)
    content = {"schema_version": 1, "name": "test", "encoding": "offset", "sharing": sharing, "dac_bits": 1}
    return Chip.model_validate({**content, "crossbars": (main,), **changes})


def matrices(*crossbars: int) -> dict[str, Matrix]:
    """Nodes of that many full crossbars of 4 kernels of 8 bits."""
    return {f"n{i}": Matrix(1, 16 * size, np.full((1, 4), 8)) for i, size in enumerate(crossbars)}


def test_parts_by_hand() -> None:
    work = matrices(2, 1, 2, 1, 1, 4)
    found = place_in_parts(work, chip(4), list(work), "auto")
    assert [part.nodes for part in found.partitions] == [("n0", "n1"), ("n2", "n3", "n4"), ("n5",)]
    assert [(part.first, part.slots) for part in found.partitions] == [((0,), (3,)), ((3,), (4,)), ((7,), (4,))]
    assert found.crossbars == 11
    home = {name: part for part in found.partitions for name in part.nodes}
    assert all(home[b.node].first[0] <= b.crossbar < home[b.node].first[0] + 4 for b in found.blocks)
    assert found.lower_bound == 11  # the chip's counts do not bound what is programmed in turn


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(5, 9))
def test_no_cut_has_fewer_parts(sizes: list[int], count: int) -> None:
    work = matrices(*sizes)
    found = place_in_parts(work, chip(count), list(work), "auto")
    assert [name for part in found.partitions for name in part.nodes] == list(work)
    assert all(part.slots[0] <= count for part in found.partitions)
    fewest = [0]  # by number of nodes, over all cuts
    for end in range(1, len(sizes) + 1):
        fewest.append(min(fewest[start] + 1 for start in range(end) if sum(sizes[start:end]) <= count))
    assert len(found.partitions) == fewest[-1]


def test_a_model_that_fits_is_one_part() -> None:
    work = matrices(2, 1)
    found, whole = place_in_parts(work, chip(4), list(work), 1), place(work, chip(4))
    assert found.blocks == whole.blocks
    assert len(found.parts) == len(whole.parts) == 1
    assert found.lower_bound == whole.lower_bound


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 3), st.sampled_from(["diagonal", "time"]))
def test_parts_take_what_each_takes_alone(rows: list[int], count: int, sharing: str) -> None:
    """Crossbars are not shared across parts, so that a model in parts may take more than at once, never fewer."""
    work = {f"n{i}": Matrix(1, size, np.full((1, 2), 4)) for i, size in enumerate(rows)}
    small = chip(max(count, -(-max(rows) // 16)), sharing)
    found = place_in_parts(work, small, list(work), "auto")
    alone = [place({name: work[name] for name in part.nodes}, small).crossbars for part in found.partitions]
    assert found.crossbars == sum(alone) >= found.lower_bound
    exact = place_in_parts(work, small, list(work), "auto", method="exact", max_crossbars=found.crossbars)
    assert exact.crossbars <= found.crossbars


def test_what_cannot_be_done_is_said() -> None:
    work = matrices(2, 5, 1)
    with pytest.raises(DoesNotFitError, match=r"node n1 alone .*it takes 5 crossbars, chip test has 4; use fewer bits"):
        place_in_parts(work, chip(4), list(work), "auto")
    work = matrices(3, 3, 3)
    with pytest.raises(DoesNotFitError, match="--partitions 2: on chip test the model takes 3 partitions"):
        place_in_parts(work, chip(4), list(work), 2)
    assert len(place_in_parts(work, chip(4), list(work), 3).partitions) == 3
    with pytest.raises(ConfigError, match="--partitions and --replicate"):
        require_parts("auto", 5)
    assert without_counts(chip(4)).crossbars[0].count is None


# ------------------------------------------------------------------------------------------------------ whole runs

RUN = ("optimize", "model.onnx", "--calibration", "calibration.npz", "--weight-bits", "3", "--weight-method", "nearest")
CHIPS = {
    "time": ("offset", "time", 3, ""),
    "unit column": ("offset", "exclusive", 6, 'offset_sum = "unit-column"\nflip = true\n'),
    "pairs": ("differential-column", "diagonal", 6, 'polarity_arrays = "pair"\n'),
    "rows": ("differential-row", "exclusive", 5, ""),
}


def write_chip(workspace: Path, kind: str) -> None:
    encoding, sharing, count, more = CHIPS[kind]
    (workspace / "chip.toml").write_text(
        f'schema_version = 1\nname = "small"\nencoding = "{encoding}"\nsharing = "{sharing}"\ndac_bits = 1\n{more}'
        f'cycle_ns = 50.0\n[[crossbars]]\nname = "main"\nrows = 32\ncols = 16\ncell_bits = 2\ncount = {count}\n'
        "[components]\ncell_write_ns = 20.0\ncell_write_energy_pj = 3.0\n"
    )


@pytest.mark.parametrize("kind", CHIPS)
def test_parts_pass_every_check(cli: Cli, workspace: Path, kind: str) -> None:
    write_chip(workspace, kind)
    ran = cli(*RUN, "--hw", "chip.toml", "--partitions", "auto", "--cells", "-o", "out", "--format", "json")
    assert ran.code == 0, ran.err
    report, manifest = json.loads(ran.out), read_manifest("out/manifest.json")
    parts = manifest.partitions
    assert len(report["partitions"]) == len(parts) > 1
    count = CHIPS[kind][2]
    assert all(last - first <= count for part in parts for first, last in part.crossbars)
    assert [stage.partition for stage in manifest.stages] == [n for n, part in enumerate(parts) for _ in part.nodes]
    cost = manifest.totals.cost
    # A cell takes 3 pJ, a wordline 20 ns, and parts follow each other.
    assert cost.write_energy_pj == 3.0 * cost.write_cells == sum(part.write_energy_pj or 0 for part in parts)
    assert cost.write_ns == 20.0 * sum(part.write_rows for part in parts)
    assert cost.interval_cycles == sum(part.interval_cycles or 0 for part in parts)
    assert cost.latency_cycles == sum(part.latency_cycles or 0 for part in parts)
    assert cli("validate", "out").code == 0


def test_the_shortage_is_said_with_what_helps(refused: Callable[..., str], workspace: Path) -> None:
    write_chip(workspace, "time")
    line = refused(workspace, (*RUN, "--hw", "chip.toml", "-o", "out"), "where it has 3 of main", "--partitions auto")
    assert "which takes" in line
    refused(workspace, (*RUN, "--hw", "chip.toml", "--dry-run"), "--partitions auto")
    refused(workspace, (*RUN, "--hw", "chip.toml", "--partitions", "1", "-o", "out"), "--partitions 1", "partitions")
    refused(workspace, (*RUN, "--hw", "chip.toml", "--partitions", "auto", "--replicate", "chip"), "give one")


@pytest.mark.parametrize("granularity", ["layer", "kernel"])
@pytest.mark.parametrize("budget", [4, 5, 6, 7, 8])
def test_a_budget_holds_for_all_parts_together(cli: Cli, workspace: Path, granularity: str, budget: int) -> None:
    """Packed at once the model may take fewer crossbars than in parts, which do not share any."""
    write_chip(workspace, "time")
    run = ("optimize", "model.onnx", "--calibration", "calibration.npz", "--evaluations", "1", "--format", "json")
    limits = ("--partitions", "auto", "--max-crossbars", str(budget), "--granularity", granularity)
    ran = cli(*run, "--hw", "chip.toml", *limits, "-o", "out")
    if ran.code == 2:  # One width for a whole layer, and no kernel is dropped.
        assert granularity == "layer"
        assert "crossbars are too few" in ran.err
        return
    assert ran.code == 0, ran.err
    totals = read_manifest("out/manifest.json").totals
    assert totals.crossbars[0].allocated <= budget
    assert json.loads(ran.out)["figures"][-1]["crossbars"] == totals.crossbars[0].allocated


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_is_refused(refused: Callable[..., str], workspace: Path, value: str) -> None:
    refused(workspace, (*RUN, "--partitions", value), "partitions", value, "auto for as few as will do")


def test_what_is_on_the_chip_when_is_printed(cli: Cli, workspace: Path) -> None:
    write_chip(workspace, "time")
    ran = cli(*RUN, "--hw", "chip.toml", "--partitions", "auto", "-o", "out")
    assert ran.code == 0
    shown = cli("manifest", "show", "out").out
    for text in (ran.out, shown):
        assert "partition from" in text
        assert "0 conv1" in text
        assert "a batch shares the cost of programming" in text
    assert cli(*RUN, "--hw", "chip.toml", "--partitions", "auto", "--dry-run").code == 0


def _damage(key: str, index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[key][index].update(changes)


def _smaller_chip(data: dict[str, Any]) -> None:
    data["chip"]["crossbars"][0]["count"] = data["totals"]["crossbars"][0]["count"] = 2


def test_damage_is_caught(cli: Cli, workspace: Path) -> None:
    write_chip(workspace, "time")
    assert cli(*RUN, "--hw", "chip.toml", "--partitions", "auto", "-o", "out").code == 0
    path = workspace / "out" / "manifest.json"
    sound = path.read_text()
    parts = json.loads(sound)["partitions"]
    (first, last), (_, end) = parts[0]["crossbars"][0], parts[1]["crossbars"][0]
    for damage, rule in (
        (_damage("stages", 0, partition=1), "stages.partitions"),
        (_damage("partitions", 0, nodes=[]), "stages.partitions"),
        (_damage("partitions", 0, crossbars=[]), "stages.partitions"),
        (_damage("partitions", 0, crossbars=[[first, last - 1]]), "stages.partitions"),
        (_damage("partitions", 1, crossbars=[[last, end + 1]]), "stages.partitions"),
        (_damage("partitions", 1, write_cells=1), "totals.cost"),
        (_damage("partitions", 1, interval_cycles=1), "totals.cost"),
        (lambda data: data["partitions"].pop(), "placement.bounds"),
        (lambda data: data["chip"]["crossbars"][0].update(count=1), "placement.bounds"),
        (_smaller_chip, "stages.partitions"),
    ):
        data = json.loads(sound)
        damage(data)
        data["digest"] = digest_of(data)
        path.write_text(json.dumps(data))
        checks = {
            check["name"]: check for check in json.loads(cli("validate", "out", "--format", "json").out)["checks"]
        }
        assert checks[rule]["passed"] is False, (rule, checks)
