"""The vectors that drive the wordlines: im2col for every mapped node."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.layout import MappedNode, Window

__all__ = ["from_output_vectors", "input_vectors", "output_vectors"]


def input_vectors(node: MappedNode, x: NDArray[Any], *, limit: int | None = None, fill: int = 0) -> NDArray[Any]:
    """Cut a node's input into the vectors of its MVMs.

    Args:
        node: The mapped node.
        x: Its input as ONNX defines it, padding not yet applied.
        limit: Keep at most about this many vectors, evenly spread over samples and positions.
        fill: What stands in padded positions, and between the samples of a ConvTranspose: the code of 0.

    Returns:
        Shape (P, G, K): P vectors for each of G groups, rows in the order of `WeightLayout.to_matrices`.
    """
    if node.window is not None:
        return _windows(node, node.window, x, limit, fill)
    if node.constant_left:
        rows = np.moveaxis(x, -2, -1).reshape(-1, node.layout.rows)
    else:
        rows = (x.T if node.input_transposed else x).reshape(-1, node.layout.rows)
    return rows[_spread(len(rows), limit)][:, None, :]


def output_vectors(node: MappedNode, y: NDArray[Any], *, limit: int | None = None) -> NDArray[Any]:
    """Cut a node's output, or anything of its shape, into the results of its MVMs.

    Args:
        node: The mapped node.
        y: Its output as ONNX defines it.
        limit: As for `input_vectors`: the same limit keeps the results of the same MVMs.

    Returns:
        Shape (P, G, M): P results for each of G groups.
    """
    if node.window is not None or node.constant_left:
        rows = np.moveaxis(y, 1 if node.window is not None else -2, -1)
    else:
        rows = y
    flat = rows.reshape(-1, node.layout.groups, node.layout.kernels)
    return np.asarray(flat[_spread(len(flat), limit)])


def from_output_vectors(node: MappedNode, vectors: NDArray[Any], input_shape: tuple[int, ...]) -> NDArray[Any]:
    """Inverse of `output_vectors` without a limit.

    Args:
        node: The mapped node.
        vectors: Results of all MVMs, shape (P, G, M).
        input_shape: Shape of the node's input.

    Returns:
        The node's output as ONNX defines it.
    """
    kernels = node.layout.groups * node.layout.kernels
    if node.window is not None:
        sizes = _output_sizes(node.window, input_shape[2:])
        return np.moveaxis(vectors.reshape(input_shape[0], *sizes, kernels), -1, 1)
    if node.constant_left:
        return np.moveaxis(vectors.reshape(*input_shape[:-2], input_shape[-1], kernels), -1, -2)
    outer = input_shape[1:] if node.input_transposed else input_shape[:-1]
    return vectors.reshape(*outer, kernels)


def _output_sizes(window: Window, sizes: tuple[int, ...]) -> list[int]:
    """Spatial sizes of an output."""
    found = []
    pads = _transpose_pads(window, sizes) if window.transposed else _conv_pads(window, sizes)
    for axis, (size, (before, after)) in enumerate(zip(sizes, pads, strict=True)):
        reach = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        if window.transposed:
            extra = window.output_padding[axis]
            found.append((size - 1) * window.strides[axis] + reach + extra - before - after)
        else:
            found.append((size + before + after - reach) // window.strides[axis] + 1)
    return found


def _spread(total: int, limit: int | None) -> NDArray[np.int64]:
    if limit is None or total <= limit:
        return np.arange(total)
    return np.linspace(0, total - 1, max(1, limit)).astype(np.int64)


def _windows(node: MappedNode, window: Window, x: NDArray[Any], limit: int | None, fill: int) -> NDArray[Any]:
    rank = len(window.kernel)
    if window.transposed:
        padded = _zero_stuffed(window, x, fill)
        strides = (1,) * rank
    else:
        padded = np.pad(x, [(0, 0), (0, 0), *_conv_pads(window, x.shape[2:])], constant_values=fill)
        strides = window.strides
    extent = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    axes = tuple(range(2, 2 + rank))
    views = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=axes)
    views = views[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    taps = tuple(slice(None, None, d) for d in window.dilations)
    views = views[(slice(None),) * (2 + rank) + taps]
    positions = views.shape[2 : 2 + rank]
    # (N, C, positions..., kernel...) -> chosen (sample, position) pairs -> (P, G, K)
    flat = np.moveaxis(views, 1, 1 + rank)
    chosen = _spread(len(x) * math.prod(positions), limit)
    index = np.unravel_index(chosen, (len(x), *positions))
    return flat[index].reshape(len(chosen), node.layout.groups, node.layout.rows)


def _conv_pads(window: Window, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, with `auto_pad` resolved as ONNX Conv defines it."""
    rank = len(sizes)
    if window.auto_pad == "VALID":
        return [(0, 0)] * rank
    if window.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, kernel, stride, dilation in zip(sizes, window.kernel, window.strides, window.dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if window.auto_pad == "SAME_UPPER" else (large, small))
        return pads
    return list(zip(window.pads[:rank], window.pads[rank:], strict=True))


def _zero_stuffed(window: Window, x: NDArray[Any], fill: int) -> NDArray[Any]:
    """Input of the convolution that equals a ConvTranspose: zeros between samples, then padding or cropping."""
    sizes = x.shape[2:]
    shape = (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(sizes, window.strides, strict=True)))
    stuffed = np.full(shape, fill, x.dtype)
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in window.strides))] = x
    widths: list[tuple[int, int]] = [(0, 0), (0, 0)]
    crop: list[slice] = [slice(None), slice(None)]
    pads = _transpose_pads(window, sizes)
    for kernel, dilation, (before, after), extra in zip(
        window.kernel, window.dilations, pads, window.output_padding, strict=True
    ):
        reach = (kernel - 1) * dilation
        low, high = reach - before, reach - after + extra
        widths.append((max(0, low), max(0, high)))
        crop.append(slice(max(0, -low), -max(0, -high) or None))
    return np.pad(stuffed, widths, constant_values=fill)[tuple(crop)]


def _transpose_pads(window: Window, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Padding of a ConvTranspose with `output_shape` and `auto_pad` resolved as ONNX defines them."""
    rank = len(sizes)
    if window.output_shape is None and window.auto_pad == "NOTSET":
        return list(zip(window.pads[:rank], window.pads[rank:], strict=True))
    if window.output_shape is None and window.auto_pad == "VALID":
        return [(0, 0)] * rank
    pads = []
    for axis, size in enumerate(sizes):
        stride = window.strides[axis]
        reach = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        total = stride * (size - 1) + window.output_padding[axis] + reach
        if window.output_shape is not None:
            total -= window.output_shape[-rank + axis]
        else:
            total = max(0, total - size * stride)
        if total < 0:
            # An output larger than the window reaches gets its rest at the end.
            pads.append((0, total))
            continue
        small, large = total // 2, total - total // 2
        pads.append((small, large) if window.auto_pad == "SAME_UPPER" else (large, small))
    return pads
