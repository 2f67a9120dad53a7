from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_prints_every_row_and_the_manifest() -> None:
    """ResNet-20 at 8 bits takes 90 crossbars of 128 x 128 with one node each, and 67 packed."""
    command = [sys.executable, "tools/bench_mapping.py", "--networks", "bundled:resnet20", "--arrays", "128", "hetero"]
    ran = subprocess.run(
        [*command, "--sharing", "time", "--bits", "8", "mixed", "--manifest"],
        capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("bundled")]
    assert [row[1:3] for row in rows] == [[bits, array] for bits in ("8", "mixed") for array in ("128", "hetero")]
    assert rows[0][4:8] == ["90", "67", "67", "0.00%"]
    assert all(float(row[7].removesuffix("%")) <= 3 for row in rows)
    assert sum("manifest:" in line for line in lines) == len(rows)
