"""Time, memory, file size and fidelity of 8-bit quantization, beside onnxruntime's own and that of other tools.

    python tools/bench_quantize.py
    python tools/bench_quantize.py --model resnet50 --our-methods mse --repeat 3
    python tools/bench_quantize.py --model bundled:resnet20 --images 512 --json result.json

Every method quantizes the same model on the same images, in a process of its own with the same number of threads, and
turns are taken if there are repeats: compare ratios of one run, not figures of two. onnxruntime's `quantize_static`
gets QDQ, one scale per kernel, uint8 activations and int8 weights, and one image at a time; ours the passes tidy,
annotate-tiling, calibrate, quantize-weights and insert-qdq with ranges by MSE (`raqu-whole` is all of `raqu-onnx
optimize`, which also judges uniform widths, places the crossbars and checks the files). Other tools run where they are
installed.

Wall and processor time leave imports out; peak memory counts them, and the column `imports` shows what they take.
SQNR and agreement compare the quantized model with float on other images. Drawn weights and generated images tell what
quantization costs, not what it does to a trained network.

Exits with 1 where a bar is missed, with 2 on wrong usage or where a method fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench_workers import METHODS, PEERS, Job, Measured
from bench_workload import NETWORKS, Workload, make_workload

from raqu_onnx.data import open_dataset
from raqu_onnx.errors import RaquError
from raqu_onnx.evaluation import collect, default_threads, make_session, score
from raqu_onnx.model_io import load_model, model_inputs

if TYPE_CHECKING:
    from raqu_onnx.evaluation import Score

__all__ = ["Bar", "Row", "bars", "compare"]

_WORKERS = Path(__file__).with_name("bench_workers.py")
_BATCH = 8
_SECONDS = 3600
_REFERENCE = "ort-minmax"
_OURS = "raqu-mse"
_MB = 1e6


@dataclass(frozen=True)
class Row:
    """One method on one model: medians over the repeats, and the largest peak.

    Attributes:
        method: Its name.
        measured: Time and memory, None where it was not run.
        file_mb: Size of the quantized file in 10^6 bytes.
        score: The quantized model against float on the judged images.
        note: Why there are no figures.
    """

    method: str
    measured: Measured | None = None
    file_mb: float | None = None
    score: Score | None = None
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A limit, and what was found.

    Attributes:
        what: What is limited.
        found: The figure.
        limit: The most that it may be.
    """

    what: str
    found: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.found <= self.limit


def compare(workload: Workload, methods: Sequence[str], *, threads: int, repeat: int) -> list[Row]:
    """Run all methods in turns and judge what they wrote.

    Args:
        workload: Model and images.
        methods: Names from `METHODS`.
        threads: Threads of every method.
        repeat: Turns.
    """
    runs: dict[str, list[Measured | str]] = {method: [] for method in methods}
    for turn in range(repeat):
        for method in methods:
            _say(f"{workload.name}: {method}" + (f", turn {turn + 1} of {repeat}" if repeat > 1 else ""))
            runs[method].append(_run(method, _job(workload, method, threads)))
    return [_row(workload, method, runs[method], threads) for method in methods]


def _job(workload: Workload, method: str, threads: int) -> Job:
    output = workload.calibration.with_name(f"{method}.onnx")
    return Job(str(workload.model), workload.input_name, str(workload.calibration), str(output), threads)


def _run(method: str, job: Job) -> Measured | str:
    """Measure one method in a process of its own; text says why there is no result."""
    if method in PEERS and not _installed(PEERS[method]):
        return "not installed"
    path = Path(job.output).with_suffix(".job")
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    numbers = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    try:
        done = subprocess.run(
            [sys.executable, str(_WORKERS), method, str(path)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, **dict.fromkeys(numbers, str(job.threads))},
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {_SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
    return Measured(**json.loads(done.stdout))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # A parent package is missing.
        return False


def _row(workload: Workload, method: str, runs: Sequence[Measured | str], threads: int) -> Row:
    failed = [run for run in runs if isinstance(run, str)]
    if failed:
        return Row(method, note=failed[0])
    found = [asdict(run) for run in runs if isinstance(run, Measured)]
    measured = Measured(
        **{key: statistics.median(item[key] for item in found) for key in ("wall_s", "cpu_s", "baseline_mb")},
        peak_mb=max(item["peak_mb"] for item in found),
    )
    path = Path(_job(workload, method, threads).output)
    return Row(method, measured, path.stat().st_size / _MB, _judge(workload, path, threads))


def _judge(workload: Workload, path: Path, threads: int) -> Score:
    dataset = open_dataset(
        {workload.input_name: workload.judged}, model_inputs(load_model(workload.model)), labels=workload.labels
    )
    reference, found = (
        collect(make_session(model, threads=threads), dataset, _BATCH) for model in (workload.model, path)
    )
    return score(found, reference)


def bars(model: str, rows: Sequence[Row]) -> list[Bar]:
    """What is asked of our 8-bit quantization of the networks here, of those figures that were measured.

    Args:
        model: Name of the model; others than `NETWORKS` have no bars.
        rows: What was measured.
    """
    if model not in NETWORKS:
        return []
    by = {row.method: row.measured for row in rows if row.measured is not None}
    found = []
    if _OURS in by and "ort-percentile" in by:
        ratio = by[_OURS].wall_s / by["ort-percentile"].wall_s
        found.append(Bar("time of raqu-mse over that of Percentile", ratio, 1.0))
    if _OURS in by and _REFERENCE in by:
        ours, theirs = by[_OURS], by[_REFERENCE]
        found.append(Bar("time of raqu-mse over that of MinMax", ours.wall_s / theirs.wall_s, 1.3))
        found.append(Bar("peak memory of raqu-mse over that of MinMax", ours.peak_mb / theirs.peak_mb, 1.2))
    if model == "resnet50" and _OURS in by:
        found.append(Bar("peak memory of raqu-mse in 10^6 bytes", by[_OURS].peak_mb, 1000))
    if model == "resnet18" and _OURS in by and "raqu-gptq" in by:
        found.append(Bar("processor seconds that GPTQ adds", by["raqu-gptq"].cpu_s - by[_OURS].cpu_s, 90))
    return found


# ------------------------------------------------------------------------------------------------------------- output


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _times(value: float, reference: float | None) -> str:
    return "" if not reference else f"{value / reference:.2f}x"


def _print(workload: Workload, rows: Sequence[Row], found: Sequence[Bar], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("wall s", "", "CPU s", "", "peak MB", "", "imports", "file MB", "SQNR dB", "agrees %"):
        table.add_column(name, justify="right")
    if workload.labels is not None:
        table.add_column("top-1 %", justify="right")
    reference = next((row.measured for row in rows if row.method == _REFERENCE), None)
    for row in rows:
        if row.measured is not None:
            table.add_row(row.method, *_cells(row, reference, labelled=workload.labels is not None))
    # Wide enough for every column wherever the output goes.
    console = Console(width=max(120, Console().width))
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.method}: {row.note}", markup=False, highlight=False)
    for bar in found:
        console.print(f"{'met   ' if bar.met else 'MISSED'} {bar.what}: {bar.found:.2f}, at most {bar.limit:g}")


def _cells(row: Row, reference: Measured | None, *, labelled: bool) -> list[str]:
    if row.measured is None or row.file_mb is None or row.score is None:
        return []
    cells = []
    for key in ("wall_s", "cpu_s", "peak_mb"):
        value = getattr(row.measured, key)
        cells += [f"{value:.1f}", _times(value, None if reference is None else getattr(reference, key))]
    cells += [f"{row.measured.baseline_mb:.0f}", f"{row.file_mb:.1f}"]
    cells.append("" if row.score.sqnr_db is None else f"{row.score.sqnr_db:.2f}")
    cells.append("" if row.score.agreement is None else f"{100 * row.score.agreement:.1f}")
    if labelled:
        cells.append("" if row.score.top1 is None else f"{100 * row.score.top1:.2f}")
    return cells


def _as_json(
    model: str, rows: Sequence[Row], found: Sequence[Bar], settings: Mapping[str, object]
) -> dict[str, object]:
    return {
        "model": model,
        "settings": dict(settings),
        "rows": [asdict(row) for row in rows],
        "bars": [{**asdict(bar), "met": bar.met} for bar in found],
    }


# ------------------------------------------------------------------------------------------------------- command line


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(NETWORKS),
        help=f"{', '.join(NETWORKS)}, bundled:resnet20, bundled:mobilenetv2 or an ONNX file (default: both networks)",
    )
    parser.add_argument("--images", type=int, default=32, help="calibration images (default: %(default)s)")
    parser.add_argument("--judged", type=int, default=16, help="other images to judge on (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="their height and width (default: %(default)s)")
    parser.add_argument(
        "--our-methods", default="mse,gptq,sequential", help="ours, of nearest, mse, gptq, sequential and whole"
    )
    parser.add_argument(
        "--methods",
        default=",".join(name for name in METHODS if not name.startswith("raqu-")),
        help="those of others (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads of each (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="turns, of which the median counts")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and generated images")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    given = parser.parse_args(arguments)
    given.chosen = [f"raqu-{name}" for name in _listed(given.our_methods)] + _listed(given.methods)
    unknown = [name for name in given.chosen if name not in METHODS]
    if unknown:
        parser.error(f"there is no method {unknown[0]}; methods are {', '.join(METHODS)}")
    for name in ("images", "judged", "size", "threads", "repeat"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return given


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare on every model asked for."""
    given = _arguments(arguments)
    results, missed, failed = [], False, False
    for model in given.model:
        with tempfile.TemporaryDirectory(prefix="bench_quantize_") as folder:
            try:
                workload = make_workload(
                    model, Path(folder), images=given.images, judged=given.judged, size=given.size, seed=given.seed
                )
                rows = compare(workload, given.chosen, threads=given.threads, repeat=given.repeat)
            except RaquError as error:
                _say(f"error: {error}")
                return 2
        found = bars(model, rows)
        shape = "x".join(str(size) for size in workload.judged.shape[1:])
        title = f"{model}: {given.images} images of {shape}, {given.threads} threads, judged on {workload.data}"
        _print(workload, rows, found, title)
        missed = missed or any(not bar.met for bar in found)
        failed = failed or any(row.note.startswith(("failed", "stopped")) for row in rows)
        settings = {key: getattr(given, key) for key in ("images", "judged", "size", "threads", "repeat", "seed")}
        results.append(_as_json(model, rows, found, settings))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 2 if failed else int(missed)


if __name__ == "__main__":
    sys.exit(main())
