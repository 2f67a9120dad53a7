"""Folding of BatchNormalization into the layer before it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from raqu_onnx.already_quantized import excluded_names
from raqu_onnx.graph_edit import (
    Names,
    all_finite,
    constant_array,
    constant_tensor,
    drop_unused_initializers,
    graph_of,
    is_float,
    nodes_of_type,
    replace_constant,
    require_opset,
)

if TYPE_CHECKING:
    from collections.abc import Container

    from numpy.typing import NDArray

__all__ = ["FoldBatchNormPass"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldBatchNormPass(ir.passes.InPlacePass):
    """Fold an inference-mode BatchNormalization into the Conv, ConvTranspose or Gemm that feeds it.

    Before::

        c = Conv (x, W, b)
        y = BatchNormalization <epsilon> (c, scale, B, mean, var)

    After, with `f = scale / sqrt(var + epsilon)` per output channel (Ioffe and Szegedy, ICML 2015, section 3.1)::

        y = Conv (x, W * f, (b - mean) * f + B)

    Only where nothing else reads `c` and all parameters are constants; Conv -> Relu -> BatchNormalization stays.
    The layer keeps its name, attributes and metadata and takes over the name `y`. Computed in double precision and
    stored in the weight's own type. A weight that other nodes read is copied first. A BatchNormalization whose
    `var + epsilon` is not positive, or whose result the weight's type cannot hold, stays.

    Attributes:
        exclude: Patterns of layers that stay as they are, and so does a BatchNormalization behind them.
    """

    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "fold-batchnorm"

    def requires(self, model: ir.Model) -> None:
        """Needs opset 9, from which on BatchNormalization has its one inference form.

        Raises:
            PreconditionError: If the model's opset is older.
        """
        require_opset(model, 9, self.name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place."""
        excluded = excluded_names(model, self.exclude)
        names = Names(model)
        modified = False
        for node in nodes_of_type(model, "BatchNormalization"):
            modified |= _fold(node, names, excluded)
        return ir.passes.PassResult(model, modified)


class _Affine(NamedTuple):
    """What a BatchNormalization does to channel k: `factor[k] * x + shift[k]`."""

    factor: NDArray[np.float64]
    shift: NDArray[np.float64]


def _fold(batchnorm: ir.Node, names: Names, excluded: Container[str | None]) -> bool:
    layer = _layer_before(batchnorm)
    affine = _affine(batchnorm)
    if layer is None or affine is None or layer.name in excluded:
        return False
    folded = _scaled(layer, affine)
    if folded is None:
        _logger.info("%s stays: it cannot be folded into %s", batchnorm.name, layer.name)
        return False
    weight, bias = folded
    stem = layer.name or layer.outputs[0].name or layer.op_type
    old = layer.inputs[1:]
    replace_constant(layer, 1, weight, names, f"{stem}.weight")
    replace_constant(layer, 2, bias, names, f"{stem}.bias")
    if layer.op_type == "Gemm":
        layer.attributes.pop("beta", None)
    drop_unused_initializers(old)
    _take_over(layer, batchnorm)
    return True


def _layer_before(batchnorm: ir.Node) -> ir.Node | None:
    """The Conv, ConvTranspose or Gemm that only this BatchNormalization reads."""
    value = batchnorm.inputs[0]
    layer = None if value is None else value.producer()
    if value is None or layer is None or layer.domain != "":
        return None
    if layer.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return None
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return layer if alone and layer.graph is batchnorm.graph else None


def _affine(batchnorm: ir.Node) -> _Affine | None:
    """Factor and shift per channel; None where parameters vary or the node does more than normalize."""
    if batchnorm.attributes.get_int("training_mode", 0) != 0:
        return None
    if any(output.uses() or output.is_graph_output() for output in batchnorm.outputs[1:]):
        return None
    if len(batchnorm.inputs) != 5:
        return None
    parameters = [constant_array(value) for value in batchnorm.inputs[1:]]
    scale, offset, mean, var = (None if p is None else p.astype(np.float64) for p in parameters)
    if scale is None or offset is None or mean is None or var is None:
        return None
    # The attribute is a 32-bit float, and so is the sum in the runtime; double precision is at least as good.
    spread = var + batchnorm.attributes.get_float("epsilon", 1e-5)
    if not bool((spread > 0).all()):  # also False for NaN
        _logger.info("%s stays: var + epsilon is not positive", batchnorm.name)
        return None
    factor = scale / np.sqrt(spread)
    return _Affine(factor, offset - mean * factor)


def _scaled(layer: ir.Node, affine: _Affine) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Weight and bias of the layer with the BatchNormalization inside; None where that is impossible."""
    tensor = constant_tensor(layer.inputs[1])
    if tensor is None or not is_float(tensor):
        return None
    bias: NDArray[Any] | None = np.zeros(1)
    if len(layer.inputs) > 2 and layer.inputs[2] is not None:
        bias = constant_array(layer.inputs[2])
    if bias is None:
        return None
    weight = tensor.numpy()
    shape = _factor_shape(layer, weight.shape, affine.factor.size)
    if shape is None:
        return None
    beta = layer.attributes.get_float("beta", 1.0) if layer.op_type == "Gemm" else 1.0
    new_bias = (beta * bias.astype(np.float64) if beta else np.zeros(1)) * affine.factor
    with np.errstate(over="ignore"):  # what overflows the type is refused below
        new_weight = _times(weight, affine.factor, shape).astype(weight.dtype)
        new_bias = (new_bias + affine.shift).astype(weight.dtype)
    if not all_finite(new_weight) or not all_finite(new_bias):
        return None
    return new_weight, new_bias


def _factor_shape(layer: ir.Node, weight: tuple[int, ...], channels: int) -> tuple[int, ...] | None:
    """Shape in which the factors broadcast against the weight; None where the channel counts disagree.

    A ConvTranspose's weight (C_in, C_out/G, k...) is seen as (G, C_in/G, C_out/G, k...).
    """
    if layer.op_type == "Conv":
        return (channels, *(1,) * (len(weight) - 1)) if weight[0] == channels else None
    if layer.op_type == "Gemm":
        columns = weight[0] if layer.attributes.get_int("transB", 0) else weight[1]
        if columns != channels:
            return None
        return (channels, 1) if layer.attributes.get_int("transB", 0) else (1, channels)
    groups = layer.attributes.get_int("group", 1)
    if weight[1] * groups != channels:
        return None
    return (groups, 1, weight[1], *(1,) * (len(weight) - 2))


def _times(weight: NDArray[Any], factor: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The weight times its channels' factors, in double precision and in the weight's own shape."""
    wide = weight.astype(np.float64)
    if len(shape) == weight.ndim:
        return wide * factor.reshape(shape)
    split = wide.reshape(shape[0], -1, *weight.shape[1:])
    return (split * factor.reshape(shape)).reshape(weight.shape)


def _take_over(layer: ir.Node, batchnorm: ir.Node) -> None:
    """Let the layer produce what the BatchNormalization produced, name included."""
    old, new = batchnorm.outputs[0], layer.outputs[0]
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    parameters = batchnorm.inputs[1:]
    graph_of(batchnorm).remove(batchnorm, safe=True)
    drop_unused_initializers(parameters)
    new.name = name
    new.type = new.type if old.type is None else old.type
    new.shape = new.shape if old.shape is None else old.shape
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
