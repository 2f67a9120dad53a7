"""What quantization decides for a node: codes, scales and the names under which they are emitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raqu_onnx.tiling import Matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.layout import MappedNode

__all__ = ["ActivationQuantizer", "EmittedNames", "QuantizedNode"]


@dataclass(frozen=True)
class ActivationQuantizer:
    """Affine quantizer of one tensor: `code = clip(round(x / scale) + zero_point, 0, 2**bits - 1)`.

    Attributes:
        bits: Width of the unsigned code, 2 to 8.
        scale: Step, exactly representable in float32.
        zero_point: Code of 0.0; 0 where the tensor is never negative.
    """

    bits: int
    scale: float
    zero_point: int

    @property
    def levels(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def quantize(self, x: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Codes of `x`, rounding half to even as ONNX QuantizeLinear does."""
        codes: NDArray[np.uint8] = np.clip(
            np.rint(x / np.float32(self.scale)) + self.zero_point, 0, self.levels
        ).astype(np.uint8)
        return codes

    def fake_quantize(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        """`x` after quantization and dequantization, float32."""
        steps = self.quantize(x).astype(np.float32) - np.float32(self.zero_point)
        return (steps * np.float32(self.scale)).astype(np.float32)


@dataclass(frozen=True)
class QuantizedNode:
    """Everything integer about one mapped node.

    Attributes:
        node: The node.
        bits: Weight bits per entry of the scale axis, shape (channels,); 0 for a dropped kernel.
        codes: INT8 weight codes in the shape of the ONNX tensor.
        scales: Float32 scale per entry of the scale axis, shape (channels,).
        bias: INT32 bias codes in steps of `activation.scale * scales`, shape (output channels,), or None.
        float_bias: Bias in real units for a node whose activation stays float, shape (output channels,), or None.
        activation: Quantizer of the node's input, None where it stays float.
        stored: Rows that crossbars store, shape (G, K); codes of the others are 0, as are their inputs. None for all.
    """

    node: MappedNode
    bits: NDArray[np.int64]
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias: NDArray[np.int32] | None
    float_bias: NDArray[np.float32] | None
    activation: ActivationQuantizer | None
    stored: NDArray[np.bool_] | None = None

    def matrix(self) -> Matrix:
        """The node as the mapping sees it."""
        return Matrix.of(self.node.layout, self.bits, None if self.stored is None else self.stored.sum(axis=1))

    def weight(self) -> NDArray[np.float32]:
        """The dequantized weight in the shape of the ONNX tensor."""
        shape = [1] * self.codes.ndim
        shape[self.node.layout.scale_axis] = -1
        return self.codes.astype(np.float32) * self.scales.reshape(shape)

    def bias_scales(self) -> NDArray[np.float32]:
        """Scale of each bias code, `activation.scale * scales`, shape (output channels,)."""
        if self.activation is None:
            raise ValueError(f"{self.node.name}: the activation is float, the bias has no integer scale")
        per_output = self.scales[self.node.layout.channel_index().reshape(-1)]
        return (np.float32(self.activation.scale) * per_output).astype(np.float32)

    def real_bias(self) -> NDArray[np.float32] | None:
        """The bias in real units as onnxruntime decodes it, shape (output channels,)."""
        if self.bias is None:
            return self.float_bias
        return self.bias.astype(np.float32) * self.bias_scales()


@dataclass(frozen=True)
class EmittedNames:
    """Names in the emitted ONNX model that belong to one mapped node.

    Attributes:
        weight: INT8 codes, an initializer.
        weight_scale: Its scales, an initializer.
        bias: INT32 bias codes, an initializer, or None.
        activation: The quantized input, a UINT8 value, or None where the activation stays float.
        activation_scale: Its scale, an initializer, or None.
        activation_zero_point: Its zero point, an initializer, or None.
    """

    weight: str
    weight_scale: str
    bias: str | None
    activation: str | None
    activation_scale: str | None
    activation_zero_point: str | None
