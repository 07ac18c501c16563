"""A small residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Create a 3x3 convolution that keeps the image size at stride 1.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        stride: stride in both directions.

    Returns:
        The convolution, which has no bias.
    """
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, and an activation after the addition.

    If the shape changes, the shortcut is a 1x1 convolution with batch normalization; otherwise, it
    is the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Create the layers.

        Args:
            inputs: number of input channels.
            outputs: number of output channels.
            stride: stride of the first convolution; 2 halves the height and width.
        """
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        # Each activation is a separate module, because each one gets its own quantizer.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A residual network: a stem, stages of basic blocks, global average pooling and a head.

    Args:
        in_channels: number of channels in the images.
        classes: number of outputs.
        width: number of channels in the first stage. Each further stage doubles the channels and
            halves the height and width.
        blocks: number of basic blocks in each stage; (1, 1, 1) is known as ResNet-8.
        stem_stride: stride of the stem; 2 reduces the network's computation to a quarter.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1),
        stem_stride: int = 1,
    ) -> None:
        """Create the layers, with He initialization for the convolutions."""
        super().__init__()
        self.stem = conv3x3(in_channels, width, stem_stride)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layers = []
            for stride in strides:
                layers.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to logits (B, classes)."""
        x = self.stages(self.relu(self.bn(self.stem(x))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(x)  # type: ignore[no-any-return]
