"""Conv, ConvTranspose, Gemm and MatMul on integer codes, in numpy and int64, straight from the ONNX operator texts.

Nothing here comes from the package: it is what the emitted models are judged by.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

__all__ = ["integer_sums", "output_axis"]

Integers = NDArray[np.int64]


def integer_sums(node: onnx.NodeProto, x: Integers, weight: Integers, *, constant_left: bool) -> Integers:
    """Sums of products of one node, without its bias.

    Args:
        node: The ONNX node.
        x: Input codes minus the zero point, in the shape that the node reads.
        weight: Weight codes in the shape of the ONNX tensor.
        constant_left: The weight is the first operand of a MatMul.

    Returns:
        The sums, in the shape of the node's output.
    """
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "Conv":
        return _conv(x, weight, attributes)
    if node.op_type == "ConvTranspose":
        return _conv_transpose(x, weight, attributes)
    if node.op_type == "Gemm":
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            raise ValueError(f"{node.name}: alpha and beta are not folded")
        return (x.T if attributes.get("transA") else x) @ (weight.T if attributes.get("transB") else weight)
    return weight @ x if constant_left else x @ weight


def output_axis(node: onnx.NodeProto, rank: int, *, constant_left: bool) -> int:
    """Axis of the output that kernels lie on."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return 1
    return rank - 2 if constant_left else rank - 1


def _window(attributes: dict[str, Any], kernel: tuple[int, ...]) -> tuple[int, list[int], list[int], list[int], str]:
    rank = len(kernel)
    return (
        attributes.get("group", 1),
        list(attributes.get("strides", [1] * rank)),
        list(attributes.get("dilations", [1] * rank)),
        list(attributes.get("pads", [0] * (2 * rank))),
        attributes.get("auto_pad", b"NOTSET").decode(),
    )


def _conv(x: Integers, weight: Integers, attributes: dict[str, Any]) -> Integers:
    kernel, sizes = weight.shape[2:], x.shape[2:]
    rank = len(kernel)
    groups, strides, dilations, pads, auto_pad = _window(attributes, kernel)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if auto_pad.startswith("SAME"):
        totals = [max(0, (-(-n // s) - 1) * s + e - n) for n, s, e in zip(sizes, strides, extents, strict=True)]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = less + more if auto_pad == "SAME_UPPER" else more + less
    elif auto_pad == "VALID":
        pads = [0] * (2 * rank)
    padded = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[rank + i]) for i in range(rank))])
    out = [(padded.shape[2 + i] - extents[i]) // strides[i] + 1 for i in range(rank)]
    by_group = padded.reshape(len(x), groups, -1, *padded.shape[2:])
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    result = np.zeros((len(x), groups, kernels.shape[1], *out), np.int64)
    for offset in itertools.product(*(range(k) for k in kernel)):
        taken = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(offset, dilations, out, strides, strict=True)
        )
        result += np.einsum(
            "bgc...,gmc->bgm...", by_group[(slice(None),) * 3 + taken], kernels[(slice(None),) * 3 + offset]
        )
    return result.reshape(len(x), -1, *out)


def _conv_transpose(x: Integers, weight: Integers, attributes: dict[str, Any]) -> Integers:
    kernel, sizes = weight.shape[2:], x.shape[2:]
    rank = len(kernel)
    groups, strides, dilations, pads, auto_pad = _window(attributes, kernel)
    extra = list(attributes.get("output_padding", [0] * rank))
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)]
    out = [full[i] + extra[i] - pads[i] - pads[rank + i] for i in range(rank)]
    if "output_shape" in attributes or auto_pad.startswith("SAME"):
        wanted = attributes.get("output_shape", [n * s for n, s in zip(sizes, strides, strict=True)])
        out = list(wanted)[-rank:]
        totals = [max(0, full[i] + extra[i] - out[i]) for i in range(rank)]
        # onnxruntime and the operator's text agree on this since opset 11: the odd one goes to the end for SAME_UPPER.
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = less + more if auto_pad == "SAME_UPPER" else more + less
    canvas = [max(full[i], pads[i] + out[i]) for i in range(rank)]
    by_group = x.reshape(len(x), groups, -1, *sizes)
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    result = np.zeros((len(x), groups, kernels.shape[2], *canvas), np.int64)
    for offset in itertools.product(*(range(k) for k in kernel)):
        put = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offset, dilations, sizes, strides, strict=True)
        )
        result[(slice(None),) * 3 + put] += np.einsum(
            "bgc...,gcm->bgm...", by_group, kernels[(slice(None),) * 3 + offset]
        )
    kept = tuple(slice(pads[i], pads[i] + out[i]) for i in range(rank))
    return result[(slice(None),) * 3 + kept].reshape(len(x), groups * math.prod(kernels.shape[2:3]), *out)
