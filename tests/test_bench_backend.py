"""The backend's benchmark, on few images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "bench_backend.py"


def test_both_paths_and_onnxruntime_stand_side_by_side() -> None:
    command = [sys.executable, str(TOOL), "--model", "mobilenetv2", "--images", "70", "--sliced-images", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "70 images" in done.stdout
    assert "ratio" in done.stdout
    assert "3 images" in done.stdout
    assert "equal bit for bit" in done.stdout
