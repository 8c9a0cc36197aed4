"""ResNet-18 for pictures of 32 x 32, in plain torch: a first convolution of 3 x 3 and no pooling after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions with norms, and a shortcut around them."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.around = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inside(x) + self.around(x))


def resnet18(classes: int = 10, width: int = 64) -> nn.Sequential:
    """11.2 million parameters at width 64."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    channels = width
    for stage in range(4):
        after = width * 2**stage
        layers += [Block(channels, after, 1 if stage == 0 else 2), Block(after, after, 1)]
        channels = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
