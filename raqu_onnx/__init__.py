"""Mixed-precision quantization and mapping of ONNX models for chips made of RRAM crossbars.

Example::

    import raqu_onnx

    result = raqu_onnx.optimize(
        "model.onnx",
        "out",
        calibration="calibration.npz",
        config=raqu_onnx.OptimizeConfig(max_crossbars=24),
    )
    print(result.figures[-1].crossbars, result.exit_code)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raqu_onnx.backend.simulate import SimulationReport, simulate
    from raqu_onnx.config import OptimizeConfig, load_config
    from raqu_onnx.errors import RaquError
    from raqu_onnx.hardware import Chip, CrossbarType, builtin_chips, load_chip
    from raqu_onnx.inspection import Inspection, inspect
    from raqu_onnx.manifest import Manifest, manifest_schema, read_manifest
    from raqu_onnx.optimization import optimize
    from raqu_onnx.report import report_schema
    from raqu_onnx.results import Figures, OptimizeResult
    from raqu_onnx.validation import ValidationReport, validate

__all__ = [
    "Chip",
    "CrossbarType",
    "Figures",
    "Inspection",
    "Manifest",
    "OptimizeConfig",
    "OptimizeResult",
    "RaquError",
    "SimulationReport",
    "ValidationReport",
    "builtin_chips",
    "inspect",
    "load_chip",
    "load_config",
    "manifest_schema",
    "optimize",
    "read_manifest",
    "report_schema",
    "simulate",
    "validate",
]

# Imported on first use: onnx, onnxruntime and scipy take longer to load than most commands to run.
_HOMES = {
    "Chip": "hardware",
    "CrossbarType": "hardware",
    "Figures": "results",
    "Inspection": "inspection",
    "Manifest": "manifest",
    "OptimizeConfig": "config",
    "OptimizeResult": "results",
    "RaquError": "errors",
    "SimulationReport": "backend.simulate",
    "ValidationReport": "validation",
    "builtin_chips": "hardware",
    "inspect": "inspection",
    "load_chip": "hardware",
    "load_config": "config",
    "manifest_schema": "manifest",
    "optimize": "optimization",
    "read_manifest": "manifest",
    "report_schema": "report",
    "simulate": "backend.simulate",
    "validate": "validation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"raqu_onnx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
