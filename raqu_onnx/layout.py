"""How the weight tensor of a mapped node is read as crossbar matrices.

A mapped node multiplies `G` matrices of `K` stored rows (wordlines) by `M` kernels (columns). This module turns ONNX
weight tensors into those matrices and back, and input tensors into the vectors that drive the wordlines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MappedNode", "WeightLayout", "Window"]

LayoutKind = Literal["conv", "conv-transpose", "in-out", "out-in"]


@dataclass(frozen=True)
class WeightLayout:
    """A weight tensor seen as `groups` matrices of `rows` by `kernels`.

    Attributes:
        kind: ``conv`` (C_out, C_in/G, k...), ``conv-transpose`` (C_in, C_out/G, k...), ``in-out`` (Gemm, MatMul with
            the constant on the right) or ``out-in`` (Gemm with transB, MatMul with the constant on the left).
        shape: Shape of the ONNX tensor.
        groups: `G`.
    """

    kind: LayoutKind
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def rows(self) -> int:
        """`K`: stored rows of one group's matrix."""
        match self.kind:
            case "conv":
                return math.prod(self.shape[1:])
            case "conv-transpose":
                return self.shape[0] // self.groups * math.prod(self.shape[2:])
            case "in-out":
                return self.shape[0]
            case "out-in":
                return self.shape[1]

    @property
    def kernels(self) -> int:
        """`M`: kernels (output channels) of one group."""
        match self.kind:
            case "conv":
                return self.shape[0] // self.groups
            case "conv-transpose" | "in-out":
                return self.shape[1]
            case "out-in":
                return self.shape[0]

    @property
    def scale_axis(self) -> int:
        """Axis of the ONNX tensor along which scales lie."""
        return 0 if self.kind in ("conv", "out-in") else 1

    @property
    def channels(self) -> int:
        """Length of the scale axis: `G*M`, but `M` for ConvTranspose, whose groups share their scales."""
        return self.shape[self.scale_axis]

    def channel_index(self) -> NDArray[np.int64]:
        """Position on the scale axis of every kernel, shape (G, M)."""
        index = np.arange(self.groups * self.kernels, dtype=np.int64).reshape(self.groups, self.kernels)
        return index % self.channels

    def to_matrices(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Read the ONNX tensor as matrices of shape (G, K, M)."""
        g, k, m = self.groups, self.rows, self.kernels
        match self.kind:
            case "conv":
                return weight.reshape(g, m, k).transpose(0, 2, 1)
            case "conv-transpose":
                # The equivalent convolution over the zero-stuffed input has its kernel flipped.
                spatial = tuple(range(2, weight.ndim))
                flipped = np.flip(weight, spatial).reshape(g, self.shape[0] // g, m, -1)
                return flipped.transpose(0, 1, 3, 2).reshape(g, k, m)
            case "in-out":
                return weight.reshape(1, k, m)
            case "out-in":
                return weight.T.reshape(1, k, m)

    def from_matrices(self, matrices: NDArray[Any]) -> NDArray[Any]:
        """Inverse of `to_matrices`."""
        g, m = self.groups, self.kernels
        match self.kind:
            case "conv":
                return np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(self.shape)
            case "conv-transpose":
                taps = math.prod(self.shape[2:])
                tensor = matrices.reshape(g, self.shape[0] // g, taps, m).transpose(0, 1, 3, 2)
                return np.flip(tensor.reshape(self.shape), tuple(range(2, len(self.shape)))).copy()
            case "in-out":
                return np.ascontiguousarray(matrices[0])
            case "out-in":
                return np.ascontiguousarray(matrices[0].T)


@dataclass(frozen=True)
class Window:
    """The sliding window of a Conv or ConvTranspose, one entry per spatial dimension.

    `auto_pad` is resolved against the input's shape when patches are cut, as ONNX defines it.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class MappedNode:
    """A node that crossbars compute: its ONNX names, its weight's layout and its window.

    Attributes:
        name: Node name, unique in the model.
        op_type: Conv, ConvTranspose, Gemm or MatMul.
        input_name: The activation, an ONNX value.
        weight_name: The float weight, an ONNX initializer.
        bias_name: The bias initializer or None.
        output_name: The node's output value.
        layout: How the weight is read as matrices.
        window: The sliding window, None for Gemm and MatMul.
        input_transposed: The activation is read transposed (Gemm with transA).
        constant_left: MatMul whose constant is the first operand.
        mvms: Matrix-vector products per group and sample, None where shapes are unknown.
    """

    name: str
    op_type: str
    input_name: str
    weight_name: str
    bias_name: str | None
    output_name: str
    layout: WeightLayout
    window: Window | None = None
    input_transposed: bool = False
    constant_left: bool = False
    mvms: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.layout.groups * self.layout.rows * self.layout.kernels
