"""Lookahead: slow weights that follow both players from behind, and pull them back.

After every `every` iterations, of both players at once,
    slow <- slow + SHARE (x_t - slow),    x_t <- slow.
In a game x_t goes round what it looks for; the mean of two points on its way lies further inside. Source: Zhang et al.
(2019), and for games Chavdarova et al., Taming GANs with Lookahead-Minmax (2021), whose SHARE this is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

SHARE = 0.5


class Lookahead:
    """Slow weights of `parameters`; none, and nothing happens, where `every` is 0."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], every: int):
        self.parameters, self.every = list(parameters), every
        self.start()

    def start(self, slow: list[torch.Tensor] | None = None) -> None:
        """From those of a checkpoint, or from where the players are."""
        fresh = [p.detach() for p in self.parameters] if self.every else []
        self.slow = [tensor.to(p.device).clone() for tensor, p in zip(slow or fresh, self.parameters, strict=False)]

    @torch.no_grad()
    def after(self, iteration: int) -> None:
        """To be called after every iteration, by its number, on all ranks."""
        if self.every and iteration % self.every == 0:
            for slow, parameter in zip(self.slow, self.parameters, strict=True):
                parameter.copy_(slow.lerp_(parameter, SHARE))
