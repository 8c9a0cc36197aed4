"""Games: several players, each with parameters and a loss of its own, moved by one optimizer.

The operator of a game is the vector of every player's gradient of its own loss, A(x) = (d L_1/d x_1, ..., d L_n/d x_n).
Knows nothing of optimizers and of communication.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvd_qgenx.checks import check_type


class Game(nn.ModuleDict):
    """The players of a game, by name: ``torch.nn.ModuleDict`` with a ``backward`` that keeps each loss to its player.

    As in any module, ``parameters()`` are those of all players, and names in ``named_parameters()`` and
    ``state_dict()`` start with the player's, so that two networks with equal names do not collide. A player that is
    not a network is a ``torch.nn.ParameterList``.

    Args:
        players: modules by name, any but one with a dot, which is what names of parameters are cut at; two players must
            not share a parameter.

    Raises:
        ValueError: naming the players that share a parameter, or the one that has none, or a wrong name.

    Example: a GAN, both players in one exchange.
        >>> game = Game({"generator": generator, "critic": critic})
        >>> optimizer = DistributedOptimizer(ExtraAdam(game.parameters(), lr=2e-4), game.named_parameters())
        >>> def gradients():
        ...     fake = generator(noise())
        ...     optimizer.zero_grad()
        ...     game.backward(generator=-critic(fake).mean(), critic=critic(fake).mean() - critic(real()).mean())
        >>> gradients(); optimizer.extrapolation()
        >>> gradients(); optimizer.step()
    """

    def __init__(self, players: Mapping[str, nn.Module]):
        super().__init__(check_type("players", players, Mapping))
        owners: dict[Tensor, str] = {}
        for player, module in self.items():
            if not any(True for _ in module.parameters()):
                raise ValueError(f"players must have parameters, {player!r} has none")
            for p in module.parameters():
                if owners.setdefault(p, player) != player:
                    raise ValueError(f"players must not share a parameter, {owners[p]!r} and {player!r} do")

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a player, whose name may also be that of a method or attribute."""
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"players must have names without a dot, got {name!r}")
        if hasattr(self, name) and name not in self._modules:
            # Torch refuses these, since `game.items` could not be both; `game["items"]` can.
            self._modules[name] = check_type(f"player {name!r}", module, nn.Module)
        else:
            super().add_module(name, module)

    def backward(self, /, **losses: Tensor) -> None:
        """Adds to every player's ``p.grad`` the gradient of its own loss, and nothing of the others'.

        Args:
            losses: a scalar for every player, by name. Losses may share parts of their graphs, which are freed
                together at the end; nothing needs to be detached.

        Raises:
            ValueError: naming the players without a loss and the losses without a player, or the player whose loss
                has no gradient.
        """
        if losses.keys() != self.keys():
            given, players = ", ".join(sorted(losses)) or "none", ", ".join(sorted(self.keys()))
            raise ValueError(f"losses must be one for each player: players are {players}, losses are {given}")
        for player, loss in losses.items():
            if check_type(f"loss of {player}", loss, Tensor).numel() != 1 or not loss.requires_grad:
                raise ValueError(f"loss of {player} must be one number that depends on parameters, got {loss!r}")
        # Losses may share their graphs, which the last backward frees for all.
        left = len(losses)
        for player, loss in losses.items():
            left -= 1
            # A frozen player still has a loss, and nothing to receive its gradient.
            if inputs := [p for p in self[player].parameters() if p.requires_grad]:
                torch.autograd.backward(loss, inputs=inputs, retain_graph=left > 0)
