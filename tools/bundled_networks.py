"""The two networks of the bundled model family, as torch modules for 28x28 images.

Module names become node and initializer names of the ONNX files (`stage2.block1.conv1.weight`),
so they are public.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn


def _sequence(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _sequence(conv=_convolution(inputs, outputs, 1, stride), bn=nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H/stride, W/stride]``."""
        y: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(y + self.shortcut(x))
        return result


class ResNet20(nn.Module):
    """ResNet-20 of width 16 (He et al., CVPR 2016, section 4.2) with projection shortcuts.

    22 nodes hold 270,608 weights: 19 convolutions of 3x3, two shortcuts of 1x1, one linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _sequence(conv=_convolution(1, 16, 3), bn=nn.BatchNorm2d(16), relu=nn.ReLU())
        self.stage1 = self._stage(16, 16, stride=1)
        self.stage2 = self._stage(16, 32, stride=2)
        self.stage3 = self._stage(32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return _sequence(
            block1=BasicBlock(inputs, outputs, stride),
            block2=BasicBlock(outputs, outputs, 1),
            block3=BasicBlock(outputs, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 1, 28, 28]`` in 0..1 to logits ``[N, 10]``."""
        features = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.classifier(self.flatten(self.pool(features)))
        return logits


class InvertedResidual(nn.Module):
    """Expand (1x1), filter (3x3 depthwise), project (1x1, linear).

    The input is added to the output where the shape is kept.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = _convolution_relu6(inputs, hidden, 1)
        self.depthwise = _convolution_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.project = _sequence(conv=_convolution(hidden, outputs, 1), bn=nn.BatchNorm2d(outputs))
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H/stride, W/stride]``."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.keeps_shape else y


def _convolution_relu6(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return _sequence(
        conv=_convolution(inputs, outputs, size, stride, groups),
        bn=nn.BatchNorm2d(outputs),
        relu6=nn.ReLU6(),
    )


class MobileNetV2(nn.Module):
    """A small MobileNetV2 (Sandler et al., CVPR 2018): depthwise, ReLU6, linear bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution_relu6(1, 16, 3)
        self.blocks = _sequence(
            block1=InvertedResidual(16, 16, stride=1, expansion=1),
            block2=InvertedResidual(16, 24, stride=2, expansion=4),
            block3=InvertedResidual(24, 24, stride=1, expansion=4),
            block4=InvertedResidual(24, 40, stride=2, expansion=4),
            block5=InvertedResidual(40, 40, stride=1, expansion=4),
            block6=InvertedResidual(40, 64, stride=1, expansion=4),
            block7=InvertedResidual(64, 64, stride=1, expansion=4),
        )
        self.head = _convolution_relu6(64, 128, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 1, 28, 28]`` in 0..1 to logits ``[N, 10]``."""
        features = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(self.flatten(self.pool(features)))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": ResNet20, "mobilenetv2": MobileNetV2}
