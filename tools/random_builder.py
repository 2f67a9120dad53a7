"""What random graphs are made with: draws, tensors, and constants in all the forms that exporters write.

See `random_graphs.py` for the operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["GraphBuilder", "Shape", "Value", "is_small"]

# Values of one sample of one tensor: small graphs find the same defects as large ones.
_MOST_VALUES = 500
Shape = tuple[int, ...]


@dataclass
class Value:
    """A tensor; its shape is that of one sample."""

    name: str
    shape: Shape
    used: bool = False


@dataclass
class GraphBuilder:
    """Adds one operator after another to whatever tensors there are."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    feeds: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    weights: dict[Shape, list[str]] = field(default_factory=dict)
    count: int = 0
    batch: int | None = None
    opset: int = 18

    # --- draws ------------------------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < share)

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    # --- the graph --------------------------------------------------------------------------------------------

    def source(self) -> Value:
        """A tensor to go on from, mostly the last."""
        recent = self.values[-3:]
        return self.values[-1] if self.chance(0.75) else self.pick(*(recent if self.chance(0.7) else self.values))

    def name(self, stem: str) -> str:
        """A new name; now and then one that could be taken for one of ours."""
        self.count += 1
        ending = self.pick("", "", "", "", ":0", "/out", "_quantized", "_scale", "_a8")
        return f"{stem}_{self.count}{ending}"

    def add_input(self) -> None:
        """One more graph input with data of some style."""
        rank = self.pick(0, 1, 2, 2, 2, 3)
        most = {0: 0, 1: 13, 2: 9, 3: 5}[rank]
        shape = (self.whole(1, 6 if rank else 12), *(self.whole(2, most) for _ in range(rank)))
        value = Value(self.name("x"), shape)
        self.inputs.append(value)
        self.values.append(value)
        samples = 6 if self.batch is None else self.batch * -(-6 // self.batch)
        data = self.rng.normal(size=(samples, *shape))
        style = self.pick("normal", "normal", "positive", "negative", "picture", "shifted")
        if style in ("positive", "negative"):
            data = np.abs(data) * (1 if style == "positive" else -1)
        elif style == "picture":
            data = np.clip(np.rint(128 + 60 * data), 0, 255) * self.pick(1.0, 1 / 255)
        elif style == "shifted":
            data = 0.3 * data + self.pick(-2.0, 3.0)
        if self.chance(0.15):
            # A channel without variance.
            data[:, self.whole(0, shape[0] - 1)] = self.pick(0.0, 1.5, -0.25)
        self.feeds[value.name] = data.astype(np.float32)

    def choose_outputs(self) -> None:
        """Tensors that nothing reads, some of them dead ends, and now and then one that is read as well."""
        inner = [value for value in self.values if value not in self.inputs]
        ends = [value for value in inner if not value.used]
        self.outputs = [value for value in ends[:-1] if self.chance(0.8)] + ends[-1:]
        read = [value for value in inner if value.used]
        if read and self.chance(0.15):
            self.outputs.append(self.pick(*read))

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        dynamic = self.chance(0.15)
        unnamed = self.chance(0.2)
        for node in self.nodes:
            node.name = "" if unnamed else node.name
        batch: Any = "N" if self.batch is None else self.batch
        inputs = [(v, [f"{v.name}_{i}" if dynamic else size for i, size in enumerate(v.shape)]) for v in self.inputs]
        outputs = [(v, [None if dynamic else size for size in v.shape]) for v in self.outputs]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [self._info(value, [batch, *shape]) for value, shape in inputs],
            [self._info(value, [batch, *shape]) for value, shape in outputs],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        version = max(8, helper.find_min_ir_version_for(opsets))
        return helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="random_graphs")

    def _info(self, value: Value, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape)

    def node(self, op_type: str, inputs: list[str], shape: Shape | None = None, **attributes: Any) -> Value:
        """Add a node; without a shape its output is no tensor that operators go on from."""
        by_name = {value.name: value for value in self.values}
        for name in inputs:
            if name in by_name:
                by_name[name].used = True
        output = Value(self.name(op_type.lower()), shape or ())
        self.nodes.append(helper.make_node(op_type, inputs, [output.name], f"{op_type}_{self.count}", **attributes))
        if shape is not None:
            self.values.append(output)
        return output

    # --- constants --------------------------------------------------------------------------------------------

    def integers(self, *values: int) -> str:
        """An INT64 vector."""
        return self._initializer(np.array(values, np.int64), "k")

    def scalar(self, value: float) -> str:
        """A float scalar."""
        return self._initializer(np.array(value, np.float32), "c")

    def _initializer(self, array: NDArray[Any], stem: str) -> str:
        name = self.name(stem)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def constant(self, array: NDArray[Any]) -> str:
        """A float constant, stored in one of the ways that exporters know."""
        array = np.asarray(array, np.float32)
        form = self.pick(
            *["plain"] * 9, "node", "node", "identity", "transpose", "half", "double", "reshape", "decoded"
        )
        if form == "half" and np.abs(array).max(initial=0) < 6e4:
            return self.node("Cast", [self._initializer(array.astype(np.float16), "w")], to=TensorProto.FLOAT).name
        if form == "double":
            return self.node("Cast", [self._initializer(array.astype(np.float64), "w")], to=TensorProto.FLOAT).name
        if form == "node":
            return self.node("Constant", [], value=numpy_helper.from_array(array)).name
        if form == "identity":
            return self.node("Identity", [self._initializer(array, "w")]).name
        if form == "transpose" and array.ndim > 1:
            order = [int(axis) for axis in self.rng.permutation(array.ndim)]
            return self.node("Transpose", [self._initializer(array.transpose(np.argsort(order)), "w")], perm=order).name
        if form == "reshape" and array.ndim > 1:
            flat = self._initializer(array.reshape(-1), "w")
            return self.node("Reshape", [flat, self.integers(*array.shape)]).name
        if form == "decoded" and array.ndim > 1:
            scale = np.float32(max(float(np.abs(array).max(initial=0)), 1e-6) / 127)
            codes = self._initializer(np.rint(array / scale).astype(np.int8), "w")
            cast = self.node("Cast", [codes], to=TensorProto.FLOAT)
            return self.node("Mul", [cast.name, self.scalar(float(scale))]).name
        return self._initializer(array, "w")

    def weight(self, shape: Shape, axis: int, fan_in: int) -> str:
        """A weight whose kernels lie on `axis`; at times one that another node has already."""
        if shape in self.weights and self.chance(0.5):
            return str(self.pick(*self.weights[shape]))
        array = self.rng.normal(size=shape) * math.sqrt(2 / fan_in)
        along = [1] * len(shape)
        along[axis] = -1
        kernels = shape[axis]
        match self.pick(*[""] * 8, "zero", "spread", "size", "positive", "sparse", "outlier", "equal"):
            case "zero":
                array = array * (self.rng.random(kernels) < self.pick(0.7, 0.7, 0.0)).reshape(along)
            case "spread":
                array = array * (10 ** self.rng.uniform(-2, 2, kernels)).reshape(along)
            case "size":
                array = array * 10 ** self.rng.uniform(-4, 3)
            case "positive":
                array = np.abs(array)
            case "sparse":
                array = array * (self.rng.random(shape) < 0.3)
            case "outlier":
                array.reshape(-1)[self.whole(0, array.size - 1)] *= 30
            case "equal":
                array = np.full(shape, 0.5) * np.sign(array)
        name = self.constant(array)
        self.weights.setdefault(shape, []).append(name)
        return name

    def bias(self, channels: int) -> list[str]:
        """A bias as a list of operands, empty for none."""
        if self.chance(0.3):
            return []
        size = self.pick(0.1, 0.3, 1.0, 0.0, 30.0)
        array = self.rng.normal(size=channels) * size
        if self.chance(0.1):
            # Channels that a ReLU behind turns off for good.
            array[self.rng.random(channels) < 0.5] = -1e4
        return [self.constant(array)]


def is_small(*shape: int) -> bool:
    """Whether a tensor of this shape has values, and not too many."""
    return 0 < math.prod(shape) <= _MOST_VALUES and min(shape) > 0
