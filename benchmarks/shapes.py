"""Lists of parameters to exchange gradients of, by name: networks as they are, and plain lists.

"wgan:128" is the generator and the critic of train/models.py at this width, "resnet50" torchvision's, "vector:100" one
parameter of 100 coordinates, "matrix:10x20" one of this shape, "equal:500x2000" 500 of 2,000 coordinates each.
"""

from __future__ import annotations

import math
import sys

from records import ROOT

Shapes = dict[str, tuple[int, ...]]
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # of ResNet-50: blocks, and channels inside them


def shapes_of(model: str) -> Shapes:
    """The parameters' names and shapes, in the model's own order."""
    kind, _, size = model.partition(":")
    try:
        return MODELS[kind](*(int(number) for number in size.split("x") if number))
    except (KeyError, TypeError, ValueError):
        known = "wgan:WIDTH, resnet50, vector:N, matrix:NxM or equal:COUNTxN"
        raise SystemExit(f"model must be {known}, got {model!r}") from None


def count(shapes: Shapes) -> int:
    """Coordinates of them all."""
    return sum(math.prod(shape) for shape in shapes.values())


def wgan(width: int) -> Shapes:
    sys.path.insert(0, str(ROOT / "train"))
    from models import Critic, Generator

    players = {"generator": Generator(width, 128), "critic": Critic(width)}
    return {f"{player}.{name}": tuple(p.shape) for player, net in players.items() for name, p in net.named_parameters()}


def resnet50() -> Shapes:
    found = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    channels = 64
    for stage, (blocks, inside) in enumerate(STAGES, start=1):
        for block in range(blocks):
            found |= bottleneck(f"layer{stage}.{block}", channels, inside)
            channels = 4 * inside
    return found | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def bottleneck(name: str, channels: int, inside: int) -> Shapes:
    """Three convolutions with norms, and a fourth around them where the number of channels changes."""
    outside = 4 * inside
    found = {}
    kernels = ((inside, channels, 1, 1), (inside, inside, 3, 3), (outside, inside, 1, 1))
    for index, kernel in enumerate(kernels, start=1):
        found |= {f"{name}.conv{index}.weight": kernel, **norm(f"{name}.bn{index}", kernel[0])}
    if channels == outside:
        return found
    return found | {f"{name}.downsample.0.weight": (outside, channels, 1, 1), **norm(f"{name}.downsample.1", outside)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def vector(numel: int) -> Shapes:
    return {"vector": (numel,)}


def matrix(rows: int, columns: int) -> Shapes:
    return {"matrix": (rows, columns)}


def equal(parameters: int, numel: int) -> Shapes:
    return {f"part{index}": (numel,) for index in range(parameters)}


MODELS = {"wgan": wgan, "resnet50": resnet50, "vector": vector, "matrix": matrix, "equal": equal}
