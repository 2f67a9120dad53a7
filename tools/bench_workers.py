"""One quantization in a process of its own, for tools/bench_quantize.py.

    python tools/bench_workers.py METHOD JOB.json

The job names the model, the calibration inputs, the file to write and the threads; time, memory and a word on failure
are printed as one line of JSON. Calls of other tools are those of their own documentation, at 8 bits with a scale per
kernel.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["METHODS", "PEERS", "Job", "Measured"]

#: Methods of peers, and the module that must be there.
PEERS = {
    "aimet": "aimet_onnx",
    "quark": "quark.onnx",
    "esp-ppq": "esp_ppq",
    "onnxsim": "onnxsim",
}
_OURS = ("nearest", "mse", "gptq", "sequential")
#: Every method by name; `raqu-whole` also places the crossbars, writes the manifest and checks the files.
METHODS = (
    *(f"raqu-{method}" for method in _OURS),
    "raqu-whole",
    "ort-minmax",
    "ort-entropy",
    "ort-percentile",
    *PEERS,
)
# Images that `raqu-whole` judges uniform widths on.
_WHOLE_SELECTION = 8
# What the others do too: statistics, weights, the graph. No search, no crossbars.
_PASSES = "tidy,annotate-tiling,calibrate,quantize-weights,insert-qdq"


@dataclass(frozen=True)
class Job:
    """What to quantize.

    Attributes:
        model: The float model.
        input_name: Its input.
        calibration: `.npy` file of inputs.
        output: The file to write.
        threads: Threads of onnxruntime and of every numerical library.
    """

    model: str
    input_name: str
    calibration: str
    output: str
    threads: int


@dataclass(frozen=True)
class Measured:
    """What a quantization took.

    Attributes:
        wall_s: Wall time, imports not counted.
        cpu_s: Processor time of all threads.
        baseline_mb: Resident memory after the imports, in 10^6 bytes.
        peak_mb: Largest resident memory of the process, imports included.
    """

    wall_s: float
    cpu_s: float
    baseline_mb: float
    peak_mb: float


def _reader(job: Job) -> Iterator[dict[str, NDArray[np.float32]]]:
    import numpy as np

    images = np.load(job.calibration, mmap_mode="r")
    return ({job.input_name: np.ascontiguousarray(images[i : i + 1])} for i in range(len(images)))


def _ours(job: Job, method: str) -> Callable[[], None]:
    import numpy as np
    import scipy.linalg  # noqa: F401

    from raqu_onnx.config import OptimizeConfig
    from raqu_onnx.optimization import optimize
    from raqu_onnx.passes.write_manifest import MODEL_FILE

    whole = method == "whole"
    # Of the passes here none reads it; without any, it would be all of the calibration images.
    selection = {job.input_name: np.load(job.calibration, mmap_mode="r")[: _WHOLE_SELECTION if whole else 1]}
    config = OptimizeConfig.model_validate(
        {
            "weight_bits": 8,
            "activation_bits": 8,
            "weight_method": "mse" if whole else method,
            "activation_range": "mse",
            "passes": None if whole else _PASSES,
            "threads": job.threads,
        }
    )

    def quantize() -> None:
        folder = Path(job.output).with_suffix("")
        optimize(job.model, folder, calibration=job.calibration, selection=selection, config=config)
        shutil.move(folder / MODEL_FILE, job.output)
        shutil.rmtree(folder)

    return quantize


def _onnxruntime(job: Job, method: str) -> Callable[[], None]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out one image after the other."""

        def __init__(self) -> None:
            self._items = _reader(job)

        def get_next(self) -> dict[str, Any] | None:
            """The next image, None at the end."""
            return next(self._items, None)

    calibrate = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}[method]
    return lambda: quantize_static(
        job.model,
        job.output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[calibrate],
    )


def _aimet(job: Job, _: str) -> Callable[[], None]:
    import aimet_onnx
    import onnx

    def quantize() -> None:
        model = aimet_onnx.QuantizationSimModel(
            onnx.load(job.model),
            param_type=aimet_onnx.int8,
            activation_type=aimet_onnx.int8,
            quant_scheme="min_max",
            providers=["CPUExecutionProvider"],
        )
        model.compute_encodings(list(_reader(job)))
        onnx.save(model.to_onnx_qdq(), job.output)

    return quantize


def _quark(job: Job, _: str) -> Callable[[], None]:
    from onnxruntime.quantization import CalibrationDataReader
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config.config import QConfig

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out one image after the other, as often as it is rewound."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            """Start again."""
            self._items = _reader(job)

        def get_next(self) -> dict[str, Any] | None:
            """The next image, None at the end."""
            return next(self._items, None)

    config = QConfig.get_default_config("A8W8")
    return lambda: ModelQuantizer(config).quantize_model(job.model, job.output, Reader())


def _esp_ppq(job: Job, _: str) -> Callable[[], None]:
    import torch
    from esp_ppq import QuantizationSettingFactory, TargetPlatform
    from esp_ppq.api import export_ppq_graph, quantize_onnx_model

    def quantize() -> None:
        images = [torch.from_numpy(feed[job.input_name]) for feed in _reader(job)]
        graph = quantize_onnx_model(
            onnx_import_file=job.model,
            calib_dataloader=images,
            calib_steps=len(images),
            input_shape=list(images[0].shape),
            setting=QuantizationSettingFactory.default_setting(),
            platform=TargetPlatform.ONNXRUNTIME,
            device="cpu",
            verbose=0,
        )
        export_ppq_graph(
            graph=graph,
            platform=TargetPlatform.ONNXRUNTIME,
            graph_save_to=job.output,
            config_save_to=str(Path(job.output).with_suffix(".json")),
        )

    return quantize


def _onnxsim(job: Job, _: str) -> Callable[[], None]:
    import onnx
    import onnxsim

    def simplify() -> None:
        model, _ = onnxsim.simplify(onnx.load(job.model))
        onnx.save(model, job.output)

    return simplify


_PREPARE: dict[str, Callable[[Job, str], Callable[[], None]]] = {
    "raqu": _ours,
    "ort": _onnxruntime,
    "aimet": _aimet,
    "quark": _quark,
    "esp-ppq": _esp_ppq,
    "onnxsim": _onnxsim,
}


def _resident_mb(field: str) -> float:
    """A figure of /proc/self/status: unlike `ru_maxrss`, VmHWM does not start from the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def _limit_threads(threads: int) -> None:
    """The same threads for everyone: of processors, and of sessions that other tools open with default options."""
    import onnxruntime

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        """Session options with an explicit number of threads."""

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = threads
            self.inter_op_num_threads = 1

    onnxruntime.SessionOptions = Options


def measure(method: str, job: Job) -> Measured:
    """Quantize once."""
    _limit_threads(job.threads)
    tool, _, variant = (method, "", "") if method in PEERS else method.partition("-")
    quantize = _PREPARE[tool](job, variant)
    baseline = _resident_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    quantize()
    return Measured(time.perf_counter() - wall, time.process_time() - cpu, baseline, _resident_mb("VmHWM"))


def main() -> None:
    """Run the method that the command line names and print what it took."""
    method, path = sys.argv[1:]
    logging.disable(logging.WARNING)
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    # Other tools print to stdout, where only the result belongs.
    result, sys.stdout = sys.stdout, sys.stderr
    measured = measure(method, job)
    print(json.dumps(asdict(measured)), file=result)


if __name__ == "__main__":
    main()
