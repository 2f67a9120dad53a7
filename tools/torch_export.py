"""A torch network written as ONNX, with nothing folded."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["OPSET", "write_onnx"]

OPSET = 17


def write_onnx(network: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write a network of one input and class scores: BatchNormalization unfolded, free batch.

    The TorchScript exporter is used on purpose: it names nodes after modules and, asked to preserve the training mode
    of a network in evaluation mode, folds nothing. It warns that it is deprecated.

    Args:
        network: In evaluation mode.
        shape: Of one sample of its input.
        path: The file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(1, *shape),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )
