"""Fitting integer weights to what a node computes.

Methods, from plain to strong:

* ``nearest``: symmetric scale over the full range of each kernel, rounding to nearest.
* ``mse``: the scale of each kernel clips where that lowers the error, weighted by the power of each input.
* ``gptq``: rounds row after row and lets the rows that follow make up for the error, on the second moments of the
  inputs (Frantar et al., "GPTQ", ICLR 2023, algorithm 1), with rows in order of falling input power. Scales are those
  of ``mse``, of kernels with 4 bits and less or few rows the multiples of them that leave the least error; then single
  codes are moved as long as that lowers the error.
* ``sequential``: GPTQ node after node in graph order, each fitted to give the float output from the inputs that the
  quantized nodes before it produce; see `raqu_onnx.sequential`.

With a bias and data, all work on centred moments: the mean error of each kernel is taken up by the bias.

They are made of parts (`FitPart`), each of which can be left out to see what it gives:

* ``bias``: moments are centred and the bias takes up the mean error (of ``mse``, ``gptq`` and ``sequential``);
* ``scales``: scales are refined by the error that rounding leaves (of ``gptq`` and ``sequential``);
* ``polish``: codes are moved one by one after rounding (likewise);
* ``refit``: such scales are fitted to the codes by least squares after ``polish``, and codes to them once more
  (likewise);
* ``targets``: nodes are fitted to the float output, not to the float weight (of ``sequential``);
* ``residuals``: the target of a node whose output is added to another value includes that value's error (likewise);
* ``shrinkage``: vectors held out decide how far a node's moments are trusted, where they are few or much alike
  (likewise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from raqu_onnx.clipping import ScaleLimits, clipped_scales
from raqu_onnx.encodings import code_range
from raqu_onnx.rounding import DAMPING, Rounder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raqu_onnx.encodings import SignedEncoding
    from raqu_onnx.layout import MappedNode
    from raqu_onnx.statistics import InputMoments

__all__ = ["FIT_PARTS", "METHOD_PARTS", "FitPart", "FittedWeights", "Target", "WeightFitter", "WeightMethod"]

WeightMethod = Literal["nearest", "mse", "gptq", "sequential"]
FitPart = Literal["bias", "scales", "polish", "refit", "targets", "residuals", "shrinkage"]
FIT_PARTS: tuple[FitPart, ...] = get_args(FitPart)
#: The parts that each method has in a run; `nearest` needs no moments there and has none to centre.
METHOD_PARTS: Mapping[WeightMethod, frozenset[FitPart]] = MappingProxyType(
    {
        "nearest": frozenset(),
        "mse": frozenset(("bias",)),
        "gptq": frozenset(("bias", "scales", "polish", "refit")),
        "sequential": frozenset(FIT_PARTS),
    }
)

# Multiples of a scale that are tried, and those of the best of them after that.
_SCALE_SHARES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
_FINER_SHARES = (0.935, 0.967, 1.033, 1.065)
# Where rows are few, the error has many minima, and trying is quick.
_MANY_SHARES = tuple(np.linspace(0.5, 1.5, 41).tolist())
# Largest code up to which scales are refined: that of 4 bits. With more codes nothing is left to gain, unless rows are
# few, and then it is quick.
_FINE_CODES = 7
_FEW_ROWS = 32
_TINY = 1e-12


@dataclass(frozen=True)
class FittedWeights:
    """Codes and scales of one node.

    Attributes:
        codes: Shape (G, K, M).
        scales: Scale per entry of the scale axis, float32, shape (channels,).
        bias_shift: What the bias must take up so that the mean output stays, shape (G, M).
        error: Expected squared error of each kernel's output per vector, shape (G, M); NaN without moments.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias_shift: NDArray[np.float64]
    error: NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """What a node's weights are fitted to, where that is not the float weight itself.

    Attributes:
        weight: Weight that gives the float output best from the inputs that arrive, shape (G, K, M).
        output_mean: Mean of the output wanted, without the node's bias, shape (G, M).
        input_mean: Mean of the inputs that arrive, shape (G, K).
        second: Their second moments, shape (G, K, K), around the mean if the bias takes up the mean error.
        damping: Share of the mean input power that is added to every row's, see `Rounder`.
    """

    weight: NDArray[np.float64]
    output_mean: NDArray[np.float64]
    input_mean: NDArray[np.float64]
    second: NDArray[np.float64]
    damping: float = DAMPING


class WeightFitter:
    """Fits one node's weights to any width; what does not depend on the width is computed once.

    Args:
        node: The mapped node.
        weight: Its float weight in the shape of the ONNX tensor.
        moments: Second moments of its inputs, None to fit without data.
        scheme: The signed encoding, which sets the range of codes.
        method: How codes are chosen.
        absorb_mean: The node has a bias that takes up the mean error.
        scale_floor: Smallest scale allowed per entry of the scale axis, shape (channels,), so that the INT32 bias
            does not overflow.
        target: Replaces weight and moments by those of the inputs that really arrive.
        without: Parts of the method to leave out.
        stored: Rows that are stored, shape (G, K), None for all; what arrives at the others is 0, and so are their
            codes.
    """

    def __init__(
        self,
        node: MappedNode,
        weight: NDArray[np.floating],
        moments: InputMoments | None,
        scheme: SignedEncoding,
        *,
        method: WeightMethod = "gptq",
        absorb_mean: bool = True,
        scale_floor: NDArray[np.float64] | None = None,
        target: Target | None = None,
        without: frozenset[FitPart] = frozenset(),
        stored: NDArray[np.bool_] | None = None,
    ) -> None:
        self._scheme = scheme
        self._without = without
        self._weight = node.layout.to_matrices(np.asarray(weight, np.float64)) if target is None else target.weight
        self._channels = node.layout.channel_index()
        self._floor = np.full(node.layout.channels, _TINY) if scale_floor is None else np.maximum(scale_floor, _TINY)
        self._damping = DAMPING
        self._mean: NDArray[np.float64] | None = None
        self._output_mean: NDArray[np.float64] | None = None
        self._second: NDArray[np.float64] | None = None
        if target is not None:
            self._second, self._damping = target.second, target.damping
            self._mean, self._output_mean = target.input_mean, target.output_mean
        elif moments is not None:
            self._second = _finite(moments.covariance(centred=absorb_mean))
            self._mean = moments.mean
            self._output_mean = np.einsum("gkm,gk->gm", self._weight, self._mean)
            # With fewer vectors than rows some directions were never seen: errors must not be moved there.
            self._damping *= max(1.0, node.layout.rows / max(1, moments.count))
        if not absorb_mean:
            self._mean = self._output_mean = None
        if stored is not None:
            self._leave_out(~stored)
        self._method = method if self._second is not None or method == "nearest" else "mse"
        self._rounder: Rounder | None = None

    def fit(self, bits: NDArray[np.integer] | int) -> FittedWeights:
        """Fit all kernels.

        Args:
            bits: Width per entry of the scale axis, shape (channels,), or one for all; 0 drops a kernel.
        """
        widths = np.broadcast_to(np.asarray(bits, np.int64), self._floor.shape)
        low, high = self._limits(widths)
        scales, codes = self._codes(low, high)
        per_kernel = scales.astype(np.float64)[self._channels]
        # Large arrays are few and used again, since one node's double-precision weights may be the peak of a run.
        rounded = codes * per_kernel[:, None, :]
        stored = codes.astype(np.int8)
        del codes
        shift = np.zeros(per_kernel.shape)
        if self._mean is not None and self._output_mean is not None:
            shift = self._output_mean - np.einsum("gkm,gk->gm", rounded, self._mean)
        difference = np.subtract(self._weight, rounded, out=rounded)
        return FittedWeights(stored, scales, shift, self._error(difference))

    def _leave_out(self, rows: NDArray[np.bool_]) -> None:
        """Rows that nothing arrives at: no weight, no moments. What they gave to the mean output stays wanted."""
        self._weight = np.where(rows[:, :, None], 0.0, self._weight)
        if self._second is not None:
            self._second = np.where(rows[:, :, None] if self._second.ndim == 3 else rows, 0.0, self._second)
            if self._second.ndim == 3:
                self._second = np.where(rows[:, None, :], 0.0, self._second)
        if self._mean is not None:
            self._mean = np.where(rows, 0.0, self._mean)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for further widths."""
        second = 0 if self._second is None else self._second.nbytes
        return self._weight.nbytes + second + (0 if self._rounder is None else self._rounder.nbytes)

    def _limits(self, widths: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        table = np.array([code_range(self._scheme, int(b)) for b in range(9)], np.float64)
        return table[widths, 0], table[widths, 1]

    def _power(self) -> NDArray[np.float64]:
        """Mean square of each input row, shape (G, K); ones without data."""
        if self._second is None:
            return np.ones(self._weight.shape[:2])
        diagonal = np.diagonal(self._second, axis1=1, axis2=2) if self._second.ndim == 3 else self._second
        return np.asarray(np.maximum(diagonal, 1e-6 * diagonal.mean(1, keepdims=True) + 1e-30))

    def _scales(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scale per entry of the scale axis; kernels that share an entry are fitted together."""
        # (channels, kernels that share the entry)
        kernels = np.argsort(self._channels.reshape(-1), kind="stable").reshape(len(low), -1)
        top, bottom = (extreme.reshape(-1)[kernels] for extreme in (self._weight.max(1), self._weight.min(1)))
        full = np.maximum(top.max(1) / np.maximum(high, 1), bottom.min(1) / np.minimum(low, -1))
        full = np.maximum(full, 0)
        positive = full > 0
        ordinary = float(np.median(full[positive])) if positive.any() else 2.0**-10
        scale = np.where(positive & (high > 0), full, ordinary)
        if self._method != "nearest":
            limits = ScaleLimits(self._floor, low, high)
            scale = clipped_scales(self._weight, self._power(), kernels, scale, limits)
        return np.maximum(scale, self._floor).astype(np.float32)

    def _codes(
        self, low: NDArray[np.float64], high: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Scale per entry of the scale axis, and codes of shape (G, K, M)."""
        scales = self._scales(low, high)
        limits = low[self._channels], high[self._channels]
        if self._method != "gptq" or self._second is None or self._second.ndim == 2:
            codes = self._weight / scales.astype(np.float64)[self._channels][:, None, :]
            np.rint(codes, out=codes)
            return scales, np.clip(codes, limits[0][:, None, :], limits[1][:, None, :], out=codes)
        if self._rounder is None:
            self._rounder = Rounder(self._weight, self._second, damping=self._damping)
        fine = high <= _FINE_CODES if self._weight.shape[1] > _FEW_ROWS else np.full(high.shape, True)
        if fine.any() and "scales" not in self._without:
            scales = self._refined(self._rounder, scales, limits, fine)
        codes, _ = self._rounder.round(self._per_kernel(scales), *limits)
        if "polish" not in self._without:
            codes = self._rounder.polish(codes, self._per_kernel(scales), *limits)
            if fine.any() and "refit" not in self._without:
                scales = np.where(fine, self._refitted(self._rounder, codes, scales), scales)
                codes = self._rounder.polish(codes, self._per_kernel(scales), *limits)
        return scales, codes

    def _per_kernel(self, scales: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scale of every kernel, shape (G, M)."""
        return scales.astype(np.float64)[self._channels]

    def _per_channel(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of values per kernel, (G, M), over the kernels that share an entry of the scale axis, (channels,)."""
        total = np.zeros(self._floor.shape)
        np.add.at(total, self._channels, values)
        return total

    def _refined(
        self,
        rounder: Rounder,
        scales: NDArray[np.float32],
        limits: tuple[NDArray[np.float64], NDArray[np.float64]],
        which: NDArray[np.bool],
    ) -> NDArray[np.float32]:
        """The multiples of the scales with the least error after rounding: with few codes the guess is often off.

        Beside the first nine alone, what is tried now lowers the KL divergence of bundled models with 4-bit weights by
        8 to 19 % on the MobileNetV2 (two sets of calibration images) and by 5 to 9 % on the ResNet-20 (three).
        """
        best, least = scales, np.full(scales.shape, np.inf)
        few = self._weight.shape[1] <= _FEW_ROWS
        for shares in (_MANY_SHARES,) if few else (_SCALE_SHARES, _FINER_SHARES):
            around = best
            for share in shares:
                trial = np.where(which, np.maximum(around * share, self._floor), scales).astype(np.float32)
                error = self._per_channel(rounder.round(self._per_kernel(trial), *limits)[1])
                best, least = np.where(error < least, trial, best), np.minimum(error, least)
        return best

    def _refitted(
        self, rounder: Rounder, codes: NDArray[np.float64], scales: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The scales with the least error for given codes: `q^T H w / q^T H q`."""
        along, power = (self._per_channel(values) for values in rounder.projections(codes))
        usable = (along > 0) & (power > 0)
        fitted = np.where(usable, along / np.where(usable, power, 1), scales)
        return np.maximum(fitted, self._floor).astype(np.float32)

    def _error(self, difference: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._second is None:
            return np.full((difference.shape[0], difference.shape[2]), np.nan)
        if self._second.ndim == 2:
            return np.asarray(np.einsum("gk,gkm,gkm->gm", self._second, difference, difference))
        return np.asarray(np.einsum("gkm,gkm->gm", self._second @ difference, difference))


def _finite(second: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Second moments, or None where inputs are so large (above 1e19) that their squares overflow."""
    return second if np.isfinite(second).all() else None
