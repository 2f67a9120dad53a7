"""Random small ONNX graphs of the kinds that exporters write, with inputs to run them on.

The same seed gives the same graph. See `fuzz_graphs.py` for what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from random_builder import GraphBuilder, Shape, Value, is_small

__all__ = ["RandomGraph", "random_graph"]

_OPSETS = (13, 24)
# Most values of one weight.
_MOST_WEIGHTS = 2000


@dataclass(frozen=True)
class RandomGraph:
    """A graph and its data.

    Attributes:
        seed: What it was made from.
        model: The model.
        feeds: Samples by input name, samples along axis 0.
    """

    seed: int
    model: onnx.ModelProto
    feeds: dict[str, NDArray[np.float32]]


def random_graph(seed: int) -> RandomGraph:
    """The graph of a seed: two to eight operators or blocks of them, at least one with constant weights."""
    g = GraphBuilder(np.random.default_rng([seed, 0]))
    g.opset = g.whole(*_OPSETS)
    g.batch = g.pick(None, None, None, 1, 2, 3)
    for _ in range(g.pick(1, 1, 1, 2, 3)):
        g.add_input()
    wanted, added, weighted, tries = g.whole(2, 8), 0, 0, 0
    while added < wanted or not weighted:
        tries += 1
        kinds = _STEPS if added < wanted and tries < 80 else _WEIGHTED
        shares = np.array([share for _, share in kinds], np.float64)
        step = kinds[int(g.rng.choice(len(kinds), p=shares / shares.sum()))][0]
        done = step(g, g.source())
        added += done
        weighted += done and step in _WITH_WEIGHTS
    g.choose_outputs()
    return RandomGraph(seed, g.model(), g.feeds)


# --- operators with weights; each returns False where it does not fit the tensor ----------------------------------


def _pads(g: GraphBuilder, extents: list[int]) -> tuple[str, list[int]]:
    """Kind of padding, and begins and ends for kernels of these extents."""
    kind = g.pick("none", "half", "half", "uneven", "SAME_UPPER", "SAME_LOWER", "VALID")
    if kind == "half":
        return "NOTSET", [(extent - 1) // 2 for extent in extents] * 2
    if kind == "uneven":
        return "NOTSET", [g.whole(0, max(1, extent - 1)) for extent in extents * 2]
    return ("NOTSET" if kind == "none" else kind), [0] * (2 * len(extents))


def _padding_attributes(auto_pad: str, pads: list[int]) -> dict[str, Any]:
    if auto_pad != "NOTSET":
        return {"auto_pad": auto_pad}
    return {"pads": pads} if any(pads) else {}


def _window_output(sizes: Shape, extents: list[int], strides: list[int], auto_pad: str, pads: list[int]) -> Shape:
    if auto_pad.startswith("SAME"):
        return tuple(-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    rank = len(sizes)
    return tuple(
        (sizes[i] + pads[i] + pads[rank + i] - extents[i]) // strides[i] + 1
        if sizes[i] + pads[i] + pads[rank + i] >= extents[i]
        else 0
        for i in range(rank)
    )


def _groups(g: GraphBuilder, channels: int) -> int:
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return int(g.pick(1, 1, 1, channels, *divisors))


def _conv(g: GraphBuilder, x: Value) -> bool:
    if len(x.shape) < 2:
        return False
    channels, *sizes = x.shape
    groups = _groups(g, channels)
    kernels = groups * g.whole(1, 3 if groups > 1 else 6)
    kernel = [g.whole(1, min(4, size + 1)) for size in sizes]
    dilations = [g.pick(1, 1, 1, 2, 3) for _ in sizes]
    strides = [g.pick(1, 1, 2, 3) for _ in sizes]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto_pad, pads = _pads(g, extents)
    if auto_pad.startswith("SAME"):
        # onnxruntime takes no dilations here.
        dilations, extents = [1] * len(sizes), kernel
    spatial = _window_output(tuple(sizes), extents, strides, auto_pad, pads)
    shape = (kernels, channels // groups, *kernel)
    if not is_small(kernels, *spatial) or math.prod(shape) > _MOST_WEIGHTS:
        return False
    attributes: dict[str, Any] = {"group": groups} if groups > 1 or g.chance(0.3) else {}
    attributes |= {"strides": strides} if max(strides) > 1 or g.chance(0.5) else {}
    attributes |= {"dilations": dilations} if max(dilations) > 1 or g.chance(0.3) else {}
    attributes |= {"kernel_shape": kernel} if g.chance(0.6) else {}
    weight = g.weight(shape, 0, math.prod(shape[1:]))
    attributes |= _padding_attributes(auto_pad, pads)
    g.node("Conv", [x.name, weight, *g.bias(kernels)], (kernels, *spatial), **attributes)
    return True


def _conv_transpose(g: GraphBuilder, x: Value) -> bool:
    if len(x.shape) < 2:
        return False
    channels, *sizes = x.shape
    groups = _groups(g, channels)
    kernels = groups * g.whole(1, 3)
    kernel = [g.whole(1, 3) for _ in sizes]
    strides = [g.pick(1, 2, 2, 3) for _ in sizes]
    dilations = [g.pick(1, 1, 1, 2) for _ in sizes]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    extra = [g.whole(0, stride - 1) if g.chance(0.4) else 0 for stride in strides]
    rank = len(sizes)
    pads = [g.whole(0, extent - 1) if g.chance(0.4) else 0 for extent in extents * 2]
    full = [(size - 1) * s + e for size, s, e in zip(sizes, strides, extents, strict=True)]
    spatial = tuple(full[i] + extra[i] - pads[i] - pads[rank + i] for i in range(rank))
    shape = (channels, kernels // groups, *kernel)
    if not is_small(kernels, *(max(0, size) for size in spatial)) or math.prod(shape) > _MOST_WEIGHTS:
        return False
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    # onnx infers nonsense for an output smaller than the input.
    if g.chance(0.15) and all(size >= before for size, before in zip(spatial, sizes, strict=True)):
        attributes["output_shape"] = list(spatial)
        if g.chance(0.5):
            attributes["auto_pad"] = g.pick("SAME_UPPER", "SAME_LOWER")
    else:
        attributes |= _padding_attributes("NOTSET", pads) | ({"output_padding": extra} if any(extra) else {})
    weight = g.weight(shape, 1, channels // groups * math.prod(kernel))
    g.node("ConvTranspose", [x.name, weight, *g.bias(kernels)], (kernels, *spatial), **attributes)
    return True


def _gemm(g: GraphBuilder, x: Value) -> bool:
    if len(x.shape) != 1:
        return False
    (rows,), kernels = x.shape, g.whole(1, 9)
    attributes: dict[str, Any] = {}
    name = x.name
    if g.chance(0.2):
        name = g.node("Transpose", [name], perm=[1, 0]).name
        attributes["transA"] = 1
    transposed = g.chance(0.5)
    attributes |= {"transB": 1} if transposed else {}
    attributes |= {key: float(g.pick(0.5, 2.0, -1.0)) for key in ("alpha", "beta") if g.chance(0.2)}
    weight = g.weight((kernels, rows) if transposed else (rows, kernels), 0 if transposed else 1, rows)
    bias: list[str] = []
    shapes: list[Shape] = [(kernels,), (kernels,), (1, kernels), (1,), ()]
    shapes += [(g.batch, 1), (g.batch, kernels)] if g.batch else []
    if g.chance(0.8):
        bias = [g.constant(g.rng.normal(size=g.pick(*shapes)) * g.pick(0.1, 1.0))]
    g.node("Gemm", [name, weight, *bias], (kernels,), **attributes)
    return True


def _matmul(g: GraphBuilder, x: Value) -> bool:
    kernels = g.whole(1, 7)
    left = len(x.shape) > 1 and g.chance(0.35)
    rows = x.shape[-2 if left else -1]
    shape: Shape = (*x.shape[:-2], kernels, x.shape[-1]) if left else (*x.shape[:-1], kernels)
    if not is_small(*shape):
        return False
    weight = g.weight((kernels, rows) if left else (rows, kernels), 0 if left else 1, rows)
    y = g.node("MatMul", [weight, x.name] if left else [x.name, weight], shape)
    if g.chance(0.4):
        bias = g.rng.normal(size=(kernels, 1) if left else (kernels,)) * 0.3
        g.node("Add", [y.name, g.constant(bias)] if g.chance(0.7) else [g.constant(bias), y.name], shape)
    return True


def _odd_matmul(g: GraphBuilder, x: Value) -> bool:
    """Constants that stay in float: a vector, and a stack of matrices."""
    if len(x.shape) < 2:
        return False
    rows = x.shape[-1]
    if g.chance(0.5):
        g.node("MatMul", [x.name, g.constant(g.rng.normal(size=rows))], x.shape[:-1])
    else:
        stack = g.rng.normal(size=(*[1] * (len(x.shape) - 1), rows, 3))
        g.node("MatMul", [x.name, g.constant(stack)], (*x.shape[:-1], 3))
    return True


def _tokens(g: GraphBuilder, x: Value) -> bool:
    """A Gemm on tokens: samples and positions share the first axis between two Reshapes."""
    if len(x.shape) != 2 or g.chance(0.5):
        return False
    tokens, rows = x.shape
    kernels = g.whole(1, 6)
    flat = g.node("Reshape", [x.name, g.integers(-1, rows)])
    bias = g.bias(kernels)
    y = g.node("Gemm", [flat.name, g.weight((rows, kernels), 1, rows), *bias])
    g.node("Reshape", [y.name, g.integers(-1, tokens, kernels)], (tokens, kernels))
    return True


def _residual(g: GraphBuilder, x: Value) -> bool:
    """A convolution of one's own size, and the sum of both."""
    if len(x.shape) < 2:
        return False
    channels, rank = x.shape[0], len(x.shape) - 1
    shape = (channels, channels, *[3] * rank)
    if math.prod(shape) > _MOST_WEIGHTS:
        return False
    y = g.node(
        "Conv", [x.name, g.weight(shape, 0, channels * 3**rank), *g.bias(channels)], x.shape, pads=[1] * (2 * rank)
    )
    if g.chance(0.5):
        y = g.node("Relu", [y.name], x.shape)
    g.node("Add", [x.name, y.name] if g.chance(0.5) else [y.name, x.name], x.shape)
    return True


def _gate(g: GraphBuilder, x: Value) -> bool:
    """Squeeze and excitation (Hu et al., CVPR 2018): channels scaled by what their means say."""
    if len(x.shape) < 3:
        return False
    channels, ones = x.shape[0], [1] * (len(x.shape) - 1)
    mean = g.node("GlobalAveragePool", [x.name], (channels, *ones))
    narrow = g.whole(1, 3)
    y = g.node("Conv", [mean.name, g.weight((narrow, channels, *ones), 0, channels), *g.bias(narrow)], (narrow, *ones))
    y = g.node("Relu", [y.name], y.shape)
    y = g.node("Conv", [y.name, g.weight((channels, narrow, *ones), 0, narrow), *g.bias(channels)], (channels, *ones))
    y = g.node("Sigmoid", [y.name], y.shape)
    g.node("Mul", [x.name, y.name], x.shape)
    return True


# --- operators without weights ------------------------------------------------------------------------------------


def _batch_norm(g: GraphBuilder, x: Value) -> bool:
    channels = x.shape[0]
    variance = g.rng.uniform(0.05, 2, channels)
    if g.chance(0.15):
        # A channel that never moved in training.
        variance[g.whole(0, channels - 1)] = 0.0
    scale = g.rng.normal(1, 0.3, channels) * g.pick(1.0, 1.0, 1.0, -1.0)
    parts = [scale, g.rng.normal(size=channels) * 0.5, g.rng.normal(size=channels) * 0.5, variance]
    g.node("BatchNormalization", [x.name, *(g.constant(part) for part in parts)], x.shape, epsilon=1e-3)
    return True


def _activation(g: GraphBuilder, x: Value) -> bool:
    kind = g.pick(*["Relu"] * 3, *["Clip"] * 2, "LeakyRelu", "Sigmoid", "HardSwish", "Softmax", "Tanh", "Swish")
    if kind == "Clip":
        low, high = g.pick(*[(0.0, 6.0)] * 2, (-1.0, 1.0), (0.0, None), (None, 2.0), (0.5, 3.0))
        bounds = ["" if low is None else g.scalar(low), *([] if high is None else [g.scalar(high)])]
        g.node(kind, [x.name, *bounds], x.shape)
    elif kind == "Swish":
        y = g.node("Sigmoid", [x.name], x.shape)
        g.node("Mul", [x.name, y.name], x.shape)
    elif kind == "LeakyRelu":
        g.node(kind, [x.name], x.shape, alpha=g.pick(0.01, 0.2))
    elif kind == "Softmax":
        g.node(kind, [x.name], x.shape, axis=g.pick(1, -1))
    else:
        g.node("HardSigmoid" if kind == "HardSwish" and g.opset < 14 else kind, [x.name], x.shape)
    return True


def _pool(g: GraphBuilder, x: Value) -> bool:
    if len(x.shape) < 2:
        return False
    channels, *sizes = x.shape
    if g.chance(0.2):
        y = g.node(
            g.pick("GlobalAveragePool", "GlobalAveragePool", "GlobalMaxPool"), [x.name], (channels, *[1] * len(sizes))
        )
        if g.chance(0.5):
            g.node("Flatten", [y.name], (channels,))
        return True
    kernel = [g.whole(1, min(3, size)) for size in sizes]
    strides = [g.whole(1, 2) for _ in sizes]
    kind = g.pick("MaxPool", "MaxPool", "AveragePool")
    pads = [g.whole(0, k - 1) if g.chance(0.3) else 0 for k in kernel * 2]
    spatial = _window_output(tuple(sizes), kernel, strides, "NOTSET", pads)
    if not is_small(channels, *spatial):
        return False
    attributes = {"count_include_pad": 1} if kind == "AveragePool" and g.chance(0.5) else {}
    g.node(kind, [x.name], (channels, *spatial), kernel_shape=kernel, strides=strides, pads=pads, **attributes)
    return True


def _arithmetic(g: GraphBuilder, x: Value) -> bool:
    kind = g.pick("Add", "Add", "Add", "Mul", "Sub")
    partners = [value.name for value in g.values if value.shape == x.shape]
    other = (
        g.pick(*partners) if g.chance(0.7) else g.constant(g.rng.normal(size=(x.shape[0], *[1] * (len(x.shape) - 1))))
    )
    g.node(kind, [x.name, other] if g.chance(0.5) else [other, x.name], x.shape)
    return True


def _concat(g: GraphBuilder, x: Value) -> bool:
    partners = [value for value in g.values if value.shape[1:] == x.shape[1:] and len(value.shape) == len(x.shape)]
    chosen = [x, *(g.pick(*partners) for _ in range(g.whole(1, 2)))]
    channels = sum(value.shape[0] for value in chosen)
    if not is_small(channels, *x.shape[1:]) or channels > 16:
        return False
    g.node("Concat", [value.name for value in chosen], (channels, *x.shape[1:]), axis=1)
    return True


def _reshape(g: GraphBuilder, x: Value) -> bool:
    size = math.prod(x.shape)
    if len(x.shape) > 1 and g.chance(0.6):
        if g.chance(0.5):
            g.node("Flatten", [x.name], (size,), axis=1)
        else:
            g.node("Reshape", [x.name, g.integers(0, -1)], (size,))
        return True
    if len(x.shape) == 1 and g.chance(0.3):
        shape: Shape = (1, size) if g.chance(0.5) else (size, 1)
        g.node("Unsqueeze", [x.name, g.integers(1 if shape[0] == 1 else 2)], shape)
        return True
    divisors = [d for d in range(1, size + 1) if size % d == 0 and d <= 12]
    first = g.pick(*divisors)
    second = g.pick(*(d for d in range(1, size // first + 1) if (size // first) % d == 0))
    shape = g.pick((first, size // first), (first, second, size // first // second))
    g.node("Reshape", [x.name, g.integers(*g.pick((0, *shape), (-1, *shape)))], shape)
    return True


def _transpose(g: GraphBuilder, x: Value) -> bool:
    if len(x.shape) < 2:
        return False
    order = [int(axis) for axis in g.rng.permutation(len(x.shape))]
    g.node("Transpose", [x.name], tuple(x.shape[axis] for axis in order), perm=[0, *(axis + 1 for axis in order)])
    return True


def _pad(g: GraphBuilder, x: Value) -> bool:
    if len(x.shape) < 2:
        return False
    rank = len(x.shape)
    mode = g.pick("constant", "constant", "constant", "edge", "reflect")
    most = [0, 0, *(min(2, size - 1) if mode == "reflect" else 2 for size in x.shape[1:])]
    pads = [g.whole(0, top) for top in most * 2]
    shape = tuple(x.shape[i] + pads[i + 1] + pads[rank + 2 + i] for i in range(rank))
    if not is_small(*shape):
        return False
    value = [g.scalar(g.pick(0.0, 0.0, 1.5))] if mode == "constant" and g.chance(0.5) else []
    g.node("Pad", [x.name, g.integers(*pads), *value], shape, mode=mode)
    return True


_Step = Callable[[GraphBuilder, Value], bool]
_WEIGHTED: list[tuple[_Step, float]] = [
    (_conv, 10),
    (_conv_transpose, 3),
    (_gemm, 6),
    (_matmul, 4),
    (_tokens, 1),
    (_residual, 2),
    (_gate, 1),
]
_WITH_WEIGHTS = {step for step, _ in _WEIGHTED}
_STEPS: list[tuple[_Step, float]] = [
    *_WEIGHTED,
    (_odd_matmul, 0.2),
    (_batch_norm, 3),
    (_activation, 8),
    (_pool, 3),
    (_arithmetic, 3),
    (_concat, 2),
    (_reshape, 2),
    (_transpose, 1),
    (_pad, 1.5),
]
