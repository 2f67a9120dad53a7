"""Well-known networks as ONNX files that take no disk: every weight is zero and lies in a sparse file beside the model.

Crossbar counts depend on shapes alone, so these stand in for trained networks of any size:

    python tools/reference_models.py vgg16-imagenet FOLDER

There is no BatchNormalization in them: an exporter folds it into the convolutions, whose biases they have.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

__all__ = ["REFERENCE_MODELS", "write_reference_model"]

_OPSET = 17
_IR_VERSION = 8


class _Builder:
    """Adds one layer after another; `value` names the last activation and `shape` is its shape without the batch."""

    def __init__(self, name: str, channels: int, size: int, *, data: str) -> None:
        self.name = name
        self.data = data
        self.shape: tuple[int, ...] = (channels, size, size)
        self.value = "input"
        self.bytes = 0
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *self.shape])

    def weight(self, name: str, *shape: int) -> str:
        """A float initializer in the external file."""
        length = 4 * math.prod(shape)
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": self.data, "offset": self.bytes, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        # Memory maps like pages; exporters align in the same way.
        self.bytes += -(-length // 4096) * 4096
        self.weights.append(tensor)
        return name

    def integers(self, name: str, *values: int) -> str:
        """A small integer initializer in the model itself."""
        self.weights.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def node(self, op_type: str, *more: str, inputs: tuple[str, ...] | None = None, **attributes: Any) -> None:
        """A node that reads the last activation, unless `inputs` says otherwise."""
        name = f"{op_type.lower()}_{len(self.nodes)}"
        inputs = inputs or (self.value, *more)
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name=name, **attributes))
        self.value = f"{name}_out"

    def conv(
        self,
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        pad: int | None = None,
        *,
        relu: bool = True,
        group: int = 1,
    ) -> None:
        """A convolution, padded to keep the size unless `pad` says otherwise."""
        pad = kernel // 2 if pad is None else pad
        stem = f"conv_{len(self.nodes)}"
        weight = self.weight(f"{stem}.weight", channels, self.shape[0] // group, kernel, kernel)
        bias = self.weight(f"{stem}.bias", channels)
        self.node("Conv", weight, bias, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=group)
        self.shape = (channels, *((size + 2 * pad - kernel) // stride + 1 for size in self.shape[1:]))
        if relu:
            self.node("Relu")

    def max_pool(self, kernel: int = 2, stride: int = 2, pad: int = 0) -> None:
        """A max pooling."""
        self.node("MaxPool", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
        self.shape = (self.shape[0], *((size + 2 * pad - kernel) // stride + 1 for size in self.shape[1:]))

    def global_pool(self) -> None:
        """The average over all positions."""
        self.node("GlobalAveragePool")
        self.shape = (self.shape[0], 1, 1)

    def linear(self, *features: int) -> None:
        """Linear layers with Relu between them, the first over all activations."""
        self.node("Flatten", axis=1)
        for index, count in enumerate(features):
            if index:
                self.node("Relu")
            stem = f"linear_{len(self.nodes)}"
            weight = self.weight(f"{stem}.weight", count, math.prod(self.shape))
            self.node("Gemm", weight, self.weight(f"{stem}.bias", count), transB=1)
            self.shape = (count,)

    def residual(self, body: Callable[[], None], shortcut: Callable[[], None]) -> None:
        """The sum of two branches, then Relu."""
        value, shape = self.value, self.shape
        shortcut()
        short = self.value
        self.value, self.shape = value, shape
        body()
        self.node("Add", short)
        self.node("Relu")

    def projection(self, channels: int, stride: int) -> None:
        """A shortcut that is a 1x1 convolution where the shape changes."""
        if stride != 1 or self.shape[0] != channels:
            self.conv(channels, 1, stride, relu=False)

    def free_shortcut(self, channels: int, stride: int) -> None:
        """A shortcut without weights (He et al., CVPR 2016, option A): every other position, channels padded by 0."""
        if stride == 1:
            return
        stem = f"shortcut_{len(self.nodes)}"
        self.node(
            "Slice",
            self.integers(f"{stem}.starts", 0, 0),
            self.integers(f"{stem}.ends", *self.shape[1:]),
            self.integers(f"{stem}.axes", 2, 3),
            self.integers(f"{stem}.steps", stride, stride),
        )
        before = (channels - self.shape[0]) // 2
        after = channels - self.shape[0] - before
        self.node("Pad", self.integers(f"{stem}.pads", 0, before, 0, 0, 0, after, 0, 0))
        self.shape = (channels, *(-(-size // stride) for size in self.shape[1:]))

    def basic_block(self, channels: int, stride: int, shortcut: Callable[[int, int], None]) -> None:
        """Two 3x3 convolutions and a shortcut."""

        def body() -> None:
            self.conv(channels, 3, stride)
            self.conv(channels, relu=False)

        self.residual(body, lambda: shortcut(channels, stride))

    def bottleneck(self, channels: int, stride: int) -> None:
        """Convolutions of 1x1, 3x3 and 1x1 to four times the channels, and a projection where the shape changes."""

        def body() -> None:
            self.conv(channels, 1)
            self.conv(channels, 3, stride)
            self.conv(4 * channels, 1, relu=False)

        self.residual(body, lambda: self.projection(4 * channels, stride))

    def inverted_residual(self, channels: int, stride: int, expansion: int) -> None:
        """Expansion, depthwise 3x3 and linear projection; the input is added where the shape stays."""
        value, shape = self.value, self.shape
        hidden = expansion * shape[0]
        if expansion != 1:
            self.conv(hidden, 1)
        self.conv(hidden, 3, stride, group=hidden)
        self.conv(channels, 1, relu=False)
        if self.shape == shape:
            self.node("Add", value)

    def model(self) -> onnx.ModelProto:
        """The model that ends in the last activation."""
        output = helper.make_tensor_value_info(self.value, TensorProto.FLOAT, ["N", *self.shape])
        graph = helper.make_graph(self.nodes, self.name, [self.input], [output], self.weights)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="reference_models")


def _alexnet(net: _Builder) -> None:
    """AlexNet as in torchvision (Krizhevsky, arXiv 1404.5997)."""
    net.conv(64, 11, 4, 2)
    net.max_pool(3)
    net.conv(192, 5)
    net.max_pool(3)
    net.conv(384)
    net.conv(256)
    net.conv(256)
    net.max_pool(3)
    net.linear(4096, 4096, 1000)


def _vgg(net: _Builder, stages: tuple[tuple[int, int], ...], *features: int) -> None:
    """Stages of `count` 3x3 convolutions to `channels`, each closed by a max pooling (Simonyan, ICLR 2015)."""
    for count, channels in stages:
        for _ in range(count):
            net.conv(channels)
        net.max_pool()
    net.linear(*features)


def _vgg16(net: _Builder, *features: int) -> None:
    _vgg(net, ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), *features)


def _vgg8(net: _Builder) -> None:
    """NeuroSim's VGG8."""
    _vgg(net, ((2, 128), (2, 256), (2, 512)), 1024, 10)


def _stem(net: _Builder) -> None:
    net.conv(64, 7, 2)
    net.max_pool(3, 2, 1)


def _resnet18(net: _Builder) -> None:
    """He et al., CVPR 2016, table 1, with projections."""
    _stem(net)
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        net.basic_block(channels, stride, net.projection)
        net.basic_block(channels, 1, net.projection)
    net.global_pool()
    net.linear(1000)


def _resnet50(net: _Builder) -> None:
    """He et al., CVPR 2016, table 1; the stride lies on the 3x3 convolution, as in torchvision's."""
    _stem(net)
    for channels, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            net.bottleneck(channels, 1 if block else stride)
    net.global_pool()
    net.linear(1000)


def _mobilenetv2(net: _Builder) -> None:
    """Sandler et al., CVPR 2018, table 2; Relu stands for ReLU6, which changes no shape."""
    net.conv(32, 3, 2)
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, channels, blocks, stride in table:
        for block in range(blocks):
            net.inverted_residual(channels, 1 if block else stride, expansion)
    net.conv(1280, 1)
    net.global_pool()
    net.linear(1000)


def _resnet20(net: _Builder, shortcut: Callable[[int, int], None]) -> None:
    """He et al., CVPR 2016, section 4.2."""
    net.conv(16)
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(3):
            net.basic_block(channels, 1 if block else stride, shortcut)
    net.global_pool()
    net.linear(10)


#: Name to input channels, input size and the function that adds the layers.
_NETWORKS: dict[str, tuple[int, int, Callable[[_Builder], None]]] = {
    "alexnet": (3, 224, _alexnet),
    "vgg16-imagenet": (3, 224, lambda net: _vgg16(net, 4096, 4096, 1000)),
    "vgg16-cifar": (3, 32, lambda net: _vgg16(net, 10)),
    "vgg8-cifar": (3, 32, _vgg8),
    "resnet18": (3, 224, _resnet18),
    "resnet20-cifar": (3, 32, lambda net: _resnet20(net, net.free_shortcut)),
    "resnet20-projections": (1, 28, lambda net: _resnet20(net, net.projection)),
    "resnet50": (3, 224, _resnet50),
    "mobilenetv2": (3, 224, _mobilenetv2),
}
#: What `write_reference_model` takes.
REFERENCE_MODELS = tuple(_NETWORKS)


def write_reference_model(name: str, folder: str | Path) -> Path:
    """Write a network and its sparse file of zeros.

    Args:
        name: One of `REFERENCE_MODELS`.
        folder: Where `<name>.onnx` and `<name>.onnx.data` go; it must exist.

    Returns:
        Path of the ONNX file.

    Raises:
        KeyError: No network has that name.
    """
    channels, size, build = _NETWORKS[name]
    path = Path(folder, f"{name}.onnx")
    net = _Builder(name, channels, size, data=f"{name}.onnx.data")
    build(net)
    onnx.save(net.model(), path)
    with path.with_name(net.data).open("wb") as stream:
        stream.truncate(net.bytes)
    return path


def main() -> None:
    """Write the network that the command line names."""
    parser = argparse.ArgumentParser(description="write a reference network whose weights are zeros")
    parser.add_argument("name", choices=REFERENCE_MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write_reference_model(arguments.name, arguments.folder))


if __name__ == "__main__":
    main()
