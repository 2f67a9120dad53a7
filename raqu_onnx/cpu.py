"""Whether 8-bit weights give wrong sums in onnxruntime on some CPUs, and on this one.

On x86 CPUs without the VNNI instructions (AVX2 or AVX-512 alone), onnxruntime multiplies unsigned activations with
signed weights in pairs (VPMADDUBSW) and adds each pair in 16 bits with saturation. Two products of 255 and 127 are
64770, of which 32767 remain. Weights of 7 bits or fewer cannot reach that: 255 * -64 * 2 = -32640. With
`session.x64quantprecision=1` in its session options, onnxruntime computes exactly at the price of time. Source: the
page "Quantize ONNX models" of onnxruntime, section "When and why do I need to try U8U8?".
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from raqu_onnx.layout import WeightLayout
    from raqu_onnx.quantized import QuantizedNode

__all__ = ["SAFE_WEIGHT_BITS", "may_saturate", "saturates_here", "saturating", "saturation_warning"]

#: Widest weights whose pairwise sums fit 16 bits with any 8-bit activation.
SAFE_WEIGHT_BITS = 7

_LOWEST, _HIGHEST = -(1 << 15), (1 << 15) - 1
_MOST_NAMED = 3


def may_saturate(codes: NDArray[np.integer], layout: WeightLayout, levels: int | None) -> bool:
    """Whether two weights of a kernel, one beside the other, can exceed 16 bits in onnxruntime.

    Which weights lie side by side is up to onnxruntime, so the two largest and the two smallest of every kernel are
    looked at. Depthwise convolutions have kernels of their own in onnxruntime, which are exact (measured with 1.32).

    Args:
        codes: Weight codes in the shape of the ONNX tensor.
        layout: Its layout.
        levels: Largest activation code, None where activations stay float and so is the product.
    """
    # onnxruntime has no integer ConvTranspose.
    if levels is None or layout.kind == "conv-transpose" or _is_depthwise(layout):
        return False
    kernels = np.moveaxis(codes, layout.scale_axis, 0).reshape(layout.channels, -1)
    if kernels.shape[1] < 2:
        return False
    ordered = np.sort(kernels, axis=1)
    highest = int(ordered[:, -2:].sum(1, dtype=np.int64).max(initial=0)) * levels
    lowest = int(ordered[:, :2].sum(1, dtype=np.int64).min(initial=0)) * levels
    return highest > _HIGHEST or lowest < _LOWEST


def _is_depthwise(layout: WeightLayout) -> bool:
    return layout.kind == "conv" and len(layout.shape) == 4 and layout.shape[1] == layout.kernels == 1


def saturating(nodes: Iterable[QuantizedNode]) -> list[str]:
    """Names of the nodes whose sums may saturate on some CPUs."""
    return [
        item.node.name
        for item in nodes
        if may_saturate(item.codes, item.node.layout, None if item.activation is None else item.activation.levels)
    ]


@lru_cache(maxsize=1)
def saturates_here() -> bool:
    """Whether onnxruntime saturates on the CPU that this process runs on.

    It is tried, not looked up: flags of CPUs are named differently on every system, and emulators show the host's.

    Raises:
        ModelError: onnxruntime cannot run the trial.
    """
    from onnx import TensorProto, helper, numpy_helper

    from raqu_onnx.evaluation import make_session

    rows = 16
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "largest_sum",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, rows])],
        [numpy_helper.from_array(np.full((rows, rows), 127, np.int8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = make_session(model.SerializeToString(), threads=1)
    (sums,) = session.run(None, {"x": np.full((1, rows), 255, np.uint8)})
    return bool((sums != 255 * 127 * rows).any())


def saturation_warning(nodes: Sequence[str]) -> list[str]:
    """What a user must know of nodes whose sums may saturate, as one line; nothing without any.

    Args:
        nodes: Their names.
    """
    if not nodes:
        return []
    named = ", ".join(nodes[:_MOST_NAMED])
    if len(nodes) > _MOST_NAMED:
        named += f" and {len(nodes) - _MOST_NAMED} more"
    if saturates_here():
        problem = (
            f"this CPU has no VNNI: onnxruntime saturates sums of the 8-bit weights of {named} here, and figures of "
            "the emitted model at enable-all carry that error"
        )
    else:
        problem = (
            f"on x86 CPUs without VNNI (this one is not affected) onnxruntime saturates sums of the 8-bit weights of "
            f"{named}"
        )
    cure = f"limit weights to {SAFE_WEIGHT_BITS} bits with --reduce-range, or set session.x64quantprecision=1 in the"
    return [f"{problem}; {cure} options of the session"]
