"""How an iteration moves the players: as a list of moves, of which each takes one new gradient and one exchange.

extra_adam       both players look ahead, both step          2 moves    Gidel et al. (2019), algorithm 4
past_extra_adam  both look ahead by the last gradient, both step   1    the same, option 1
qgenx            both look ahead, both step, step size adapts      2    Q-GenX, algorithm 1
adam             the critic steps N times, then the generator    N + 1  the usual WGAN-GP: players alternate
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import launch
import torch

import hvd_qgenx

METHODS = ("extra_adam", "past_extra_adam", "qgenx", "adam")
BETA2 = 0.9
PLAYERS = ("generator", "critic")
#: Of `Communication`, what a run adds up over its optimizers, and what it goes on from.
COUNTED = ("exchanges", "bytes_sent", "coordinates", "squared_error", "squared_norm")
SEED_APART = 1_000_003  # between the players' own compressors: their draws must differ


class Move(NamedTuple):
    """``prepare`` comes before the gradient of ``players`` is taken, ``act`` after it."""

    players: tuple[str, ...]
    act: Callable[[], None]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Method:
    optimizers: tuple
    moves: tuple[Move, ...]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def counted(self) -> dict[str, float]:
        """What this rank has sent so far, over all continuations of its run."""
        return {name: sum(getattr(each.communication, name) for each in self.optimizers) for name in COUNTED}

    def seconds(self) -> dict[str, float]:
        """Time of this process spent encoding, waiting and decoding."""
        phases = self.optimizers[0].communication.seconds
        return {phase: sum(each.communication.seconds[phase] for each in self.optimizers) for phase in phases}

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def counts(self) -> list[dict[str, float]]:
        """Of each optimizer; they are no part of its state."""
        return [{name: getattr(each.communication, name) for name in COUNTED} for each in self.optimizers]

    def load(self, states: list[dict], counts: list[dict[str, float]]) -> None:
        for optimizer, state, counted in zip(self.optimizers, states, counts, strict=True):
            optimizer.load_state_dict(state)
            for name, value in counted.items():
                setattr(optimizer.communication, name, value)


def make_method(flags, game: hvd_qgenx.Game) -> Method:
    """The method that ``flags.optimizer`` names, on the parameters of ``game``."""
    if flags.optimizer == "adam":
        return _alternating(flags, game)
    opt = _distributed(flags, _at_once(flags, game), game.named_parameters(), flags.seed)
    if flags.optimizer == "past_extra_adam":
        # A move that was cut off after its look-ahead is taken up from there.
        return Method((opt,), (Move(PLAYERS, opt.step, lambda: None if opt.extrapolated else opt.extrapolation()),))
    return Method((opt,), (Move(PLAYERS, opt.extrapolation), Move(PLAYERS, opt.step)))


def _at_once(flags, game: hvd_qgenx.Game) -> torch.optim.Optimizer:
    if flags.optimizer == "qgenx":
        return hvd_qgenx.QGenX(game.parameters(), step_scale=flags.step_scale)
    rates = {"generator": flags.lr_generator, "critic": flags.lr_critic}
    groups = [{"params": game[player].parameters(), "lr": rate} for player, rate in rates.items()]
    past = flags.optimizer == "past_extra_adam"
    return hvd_qgenx.ExtraAdam(groups, betas=(flags.beta1, BETA2), past=past)


def _alternating(flags, game: hvd_qgenx.Game) -> Method:
    def adam(player: str, rate: float, seed: int):
        opt = torch.optim.Adam(game[player].parameters(), lr=rate, betas=(flags.beta1, BETA2))
        named = [(f"{player}.{name}", p) for name, p in game[player].named_parameters()]
        return _distributed(flags, opt, named, seed)

    generator = adam("generator", flags.lr_generator, flags.seed)
    critic = adam("critic", flags.lr_critic, flags.seed + SEED_APART)
    steps = (Move(("critic",), critic.step),) * flags.critic_steps
    return Method((generator, critic), (*steps, Move(("generator",), generator.step)))


def _distributed(flags, optimizer, named_parameters, seed: int):
    return hvd_qgenx.DistributedOptimizer(
        optimizer,
        named_parameters=named_parameters,
        compression=flags.compression.make(seed),
        exchange=flags.exchange,
        **launch.optimizer_options(),
    )
