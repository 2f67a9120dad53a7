"""The comparison with other tools, on the bundled model and few images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "bench_quantize.py"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_ours_and_theirs_stand_side_by_side(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = bench(
        *("--model", "bundled:resnet20", "--images", 8, "--judged", 20, "--threads", 1),
        *("--our-methods", "mse", "--methods", "ort-minmax,esp-ppq", "--json", found),
    )
    assert done.returncode == 0, done.stderr
    assert "esp-ppq: not installed" in done.stdout
    (result,) = json.loads(found.read_text(encoding="utf-8"))
    ours, theirs, peer = result["rows"]
    assert [row["method"] for row in result["rows"]] == ["raqu-mse", "ort-minmax", "esp-ppq"]
    assert peer["measured"] is None
    for row in (ours, theirs):
        measured = row["measured"]
        assert measured["cpu_s"] > 0
        assert 0 < measured["baseline_mb"] < measured["peak_mb"]
        assert row["score"]["samples"] == 20
        assert row["score"]["sqnr_db"] > 10
        assert row["score"]["top1"] > 0.7
        # A quarter of the float model's 1.1 MB, and scales.
        assert 0.25 < row["file_mb"] < 0.6
        assert row["method"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--methods", "ort-median"), 2, "there is no method ort-median; methods are raqu-nearest, "),
        (("--model", "bundled:lenet"), 2, "error: --model bundled:lenet: no such model is bundled"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
