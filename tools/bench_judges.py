"""Time a search with one process of N threads and with N processes of one thread, in turns, on one machine.

    python tools/bench_judges.py --cores 2 --rounds 3

Both ask for the same number of candidates at once and judge as many; only who judges differs. Printed are the wall time
of the search (start of the workers included) and of its stages, and the ratio of medians. The loss that both found is
printed too; it is the same where threads change no float, as in both bundled models (`raqu_onnx.search.identity`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

__all__ = ["main"]

_PARTS = {"calibration": 256, "selection": 1000, "test": 100}
_STAGES = ("judging uniform widths", "measuring sensitivity", "judging allocations", "Bayesian search")


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["resnet20", "mobilenetv2"], default="resnet20")
    parser.add_argument("--cores", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each of both ways in turn (default: 3)")
    parser.add_argument("--evaluations", type=int, default=12, metavar="N", help="default: 12")
    parser.add_argument("--max-crossbars", type=int, default=14, metavar="N", help="default: 14")
    args = parser.parse_args()
    ways = {
        f"1 process, {args.cores} threads": ["--workers", "1", "--threads", str(args.cores)],
        f"{args.cores} processes, 1 thread": ["--workers", str(args.cores), "--threads", "1"],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="bench-judges-") as folder:
        command = _prepare(Path(folder), args)
        for number in range(args.rounds):
            for way, options in ways.items():
                output = Path(folder) / f"{len(times[way])}-{options[1]}"
                seconds, words = _run([*command, *options, "-o", str(output)], output)
                times[way].append(seconds)
                print(f"round {number + 1}, {way}: {words}", flush=True)
    one, several = (statistics.median(found) for found in times.values())
    print(f"median search: {one:.1f} s and {several:.1f} s; several take {several / one:.2f} times as long as one")
    return 0


def _prepare(folder: Path, args: argparse.Namespace) -> list[str]:
    """Write model and data; returns the command without workers and output."""
    from raqu_onnx.bundled import bundled_arrays, bundled_model

    (folder / "model.onnx").write_bytes(bundled_model(args.model))
    for part, count in _PARTS.items():
        arrays = {name: array[:count] for name, array in bundled_arrays(part).items()}
        np.savez(folder / f"{part}.npz", **arrays)  # type: ignore[arg-type]
    data = [f"--{name}={folder / name}.npz" for name in ("calibration", "selection")]
    search = ["--max-crossbars", str(args.max_crossbars), "--evaluations", str(args.evaluations)]
    batch = ["--batch", str(args.cores), "--no-cache", "--format", "json"]
    return [sys.executable, "-m", "raqu_onnx", "optimize", str(folder / "model.onnx"), *data, *search, *batch]


def _run(command: list[str], output: Path) -> tuple[float, str]:
    """Time one run; returns seconds of the search, and what is printed of it."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun: dict[str, float] = {}
    for line in process.stderr or ():
        # Stages go to stderr as they begin, with the seconds so far.
        name = line[11:].strip()
        begun.setdefault(name, time.perf_counter())
    said = process.stdout.read() if process.stdout is not None else ""
    if process.wait() not in (0, 1):
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    result = json.loads(said)
    search = result["seconds"]["search-bits"]
    names = [name for name in begun if name in _STAGES or name == "pass quantize-weights"]
    ends = [*names[1:], names[-1]]
    stages = {name: begun[end] - begun[name] for name, end in zip(names, ends, strict=True)}
    answers = (output / "journal.jsonl").read_text().count('"kind":"score"')
    loss = result["front"][-1]["loss"]
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items() if name in _STAGES)
    return search, f"search {search:.1f} s ({parts}), {answers} candidates, loss {loss:.6f}"


if __name__ == "__main__":
    sys.exit(main())
