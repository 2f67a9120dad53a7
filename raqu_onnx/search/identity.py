"""What the numbers of a search depend on, in a form that can be compared and told.

A score that was written down may stand for judging again only where judging would give the same floats. That takes the
same model, data and method; the same code, here and in the libraries below; and a processor of the same kind with the
same number of threads. Of 116 random convolutions that onnxruntime 1.32 ran with 1, 2 and 4 threads, 9 (of one sample
each) differed in their last digits; scores of both bundled models at 64 samples per run did not. What is sought
(budgets, evaluations, seed) does not count: it decides what is judged, not what comes out.
"""

from __future__ import annotations

import hashlib
import platform
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raqu_onnx.annotations import CALIBRATION
from raqu_onnx.evaluation import default_threads
from raqu_onnx.metrics import parse_metric
from raqu_onnx.session_model import session_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

    from raqu_onnx.data import Dataset
    from raqu_onnx.quantizer import ModelQuantizer
    from raqu_onnx.search.result import SearchSettings

__all__ = ["Identity", "differences", "environment", "identity_digest", "judging_identity", "processor"]

Identity = dict[str, str]
"""Values, or digests of them, by what a user calls them."""

# Libraries whose release may change a float on the way to a score, or a candidate on the way to the result.
_LIBRARIES = ("numpy", "onnxruntime", "scipy", "onnx", "onnx-ir", "scikit-optimize", "scikit-learn")
# Instruction sets that decide which kernels onnxruntime and BLAS run.
_SIMD = ("avx", "amx", "fma", "sse4", "asimd", "sve", "i8mm", "bf16")


def environment() -> Identity:
    """Releases of this package and of libraries, and the processor."""
    return {
        "raqu-onnx": f"{_version('raqu-onnx')} ({_code()})",
        **{name: _version(name) for name in _LIBRARIES},
        "processor": processor(),
    }


def judging_identity(
    model: ir.Model,
    quantizer: ModelQuantizer,
    selection: Dataset,
    settings: SearchSettings,
    processors: Sequence[str] = (),
) -> Identity:
    """What scores and sensitivities of a model's candidates depend on.

    Args:
        model: The tidied, mapped and calibrated float model.
        quantizer: Its quantizer.
        selection: Data that candidates are judged on.
        settings: How they are judged.
        processors: Kinds of processors that judge, where it is not this one.
    """
    method, calibration = quantizer.settings, CALIBRATION.get(model)
    return {
        **environment(),
        **({"processor": ", ".join(processors)} if processors else {}),
        "threads": str(settings.threads or default_threads()),
        "model": _model_digest(model),
        "calibration data": "none" if calibration is None else calibration.digest,
        "statistics of the calibration data": _statistics_digest(quantizer),
        "selection data": selection.digest,
        "encoding": quantizer.scheme,
        "weight method": method.weight_method,
        "parts left out of the weight method": ",".join(sorted(method.without)) or "none",
        "samples to fit on": str(method.fit_samples),
        "activation range": method.activation_range,
        "float activations": str(settings.activation_bits is None),
        "sensitivity samples": str(settings.sensitivity_samples),
        "batch size": str(settings.batch_size),
        "task": settings.task,
        "metric": parse_metric(settings.metric).digest,
    }


def differences(ours: Identity, theirs: Identity, *, was: str = "was {}", now: str = "is {}") -> str:
    """What differs, in words; empty where nothing does.

    Args:
        ours: Of this run.
        theirs: Of what was written down.
        was: How the latter is told.
        now: How the former is told.
    """
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    words = f"{{}} {was} and {now}"
    return "; ".join(_difference(words, name, ours.get(name, "none"), theirs.get(name, "none")) for name in names)


def _difference(words: str, name: str, ours: str, theirs: str) -> str:
    # Digests say nothing to a reader.
    if all(re.fullmatch("[0-9a-f]{64}|none", value) for value in (ours, theirs)):
        return f"{name} is another"
    return words.format(name, theirs, ours)


def identity_digest(identity: Identity) -> str:
    """One name for all of it, 32 hexadecimal digits."""
    content = "\0".join(f"{name}\0{value}" for name, value in sorted(identity.items()))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


@lru_cache(maxsize=1)
def _code() -> str:
    """Digest of this package's own code: between two releases the version stays what it is."""
    root = Path(__file__).parents[1]
    # The passes and chips are linked here in a checkout, and lie here once installed.
    files = [path for folder in (root, root / "passes") for path in folder.rglob("*.py") if "cli" not in path.parts]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(set(files)):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=1)
def processor() -> str:
    """Kind of processor, and a digest of the instruction sets that it offers."""
    name, flags = platform.processor() or "unknown", ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = " ".join(sorted(flag for flag in value.split() if flag.startswith(_SIMD)))
    kind = hashlib.blake2b(flags.encode(), digest_size=4).hexdigest()
    return f"{platform.machine()} {name} {kind}"


def _model_digest(model: ir.Model) -> str:
    source = session_model(model)
    digest = hashlib.blake2b(source.proto.SerializeToString(deterministic=True), digest_size=32)
    for name, tensor in sorted(source.weights.items()):
        digest.update(name.encode() + b"\0")
        _add(digest, [tensor.numpy()])
    return digest.hexdigest()


def _statistics_digest(quantizer: ModelQuantizer) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name, source in quantizer.sources.items():
        digest.update(name.encode() + b"\0")
        if source.histogram is not None:
            seen = source.histogram
            _add(digest, [seen.counts, np.array([seen.limit, seen.low, seen.high, seen.zeros])])
        if source.moments is not None and source.moments.origin is not None:
            sums = source.moments
            _add(digest, [sums.origin, sums.total, sums.gram, np.array(sums.count)])
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, arrays: Iterable[Any]) -> None:
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
