"""The reference backend: runs a mapped model from manifest, cells and ONNX file, on virtual crossbars.

It has onnx's own backend interface::

    import raqu_onnx.backend as backend

    rep = backend.prepare("out")  # the folder that optimize wrote
    (logits,) = rep.run(images)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raqu_onnx.backend.interface import (
        CrossbarBackend,
        CrossbarBackendRep,
        is_compatible,
        prepare,
        run_model,
        run_node,
        supports_device,
    )

__all__ = [
    "CrossbarBackend",
    "CrossbarBackendRep",
    "is_compatible",
    "prepare",
    "run_model",
    "run_node",
    "supports_device",
]


def __getattr__(name: str) -> object:
    # Imported on first use: onnx and onnxruntime take their time, and the checks of validate use modules below.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from raqu_onnx.backend import interface

    return getattr(interface, name)
