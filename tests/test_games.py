"""Games: one call gives every player the gradient of its own loss and leaves the others' alone."""

import pytest
import torch
from torch import nn

from hvd_qgenx import ExtraSGD, Game


def player(*values):
    return nn.ParameterList([nn.Parameter(torch.tensor(values, dtype=torch.float64))])


def three_players():
    """Each pulls at the next: L_a = a.b, L_b = b.c + |b|^2, L_c = a.c a.b, all in one graph."""
    game = Game({"a": player(1.0, 2.0), "b": player(3.0, 5.0), "c": player(7.0, 11.0)})
    a, b, c = (part[0] for part in game.values())
    shared = a @ b
    return game, {"a": shared, "b": b @ c + b @ b, "c": (a @ c) * shared}


def test_every_player_of_three_gets_its_own_gradient():
    game, losses = three_players()
    game.backward(**losses)
    a, b, c = (part[0] for part in game.values())
    assert a.grad.tolist() == [3.0, 5.0]  # b
    assert b.grad.tolist() == [7.0 + 6.0, 11.0 + 10.0]  # c + 2 b
    assert c.grad.tolist() == [13.0, 26.0]  # a (a . b) = 13 a


def test_gradients_add_up_as_in_any_backward():
    game, losses = three_players()
    game.backward(**losses)
    _, again = three_players()
    first = game["a"][0].grad.clone()
    a, b, c = (part[0] for part in game.values())
    game.backward(a=a @ b, b=b @ c, c=a @ c)
    assert torch.equal(game["a"][0].grad, 2 * first)


def test_the_order_of_the_losses_does_not_matter():
    grads = []
    for order in (["a", "b", "c"], ["c", "b", "a"]):
        game, losses = three_players()
        game.backward(**{name: losses[name] for name in order})
        grads.append([p.grad for p in game.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_a_gan_gets_the_gradients_of_two_separate_backwards():
    torch.manual_seed(0)
    generator, critic = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    game = Game({"generator": generator, "critic": critic})
    noise, real = torch.randn(6, 3), torch.randn(6, 4)

    def losses():
        fake = generator(noise)
        return -critic(fake).mean(), critic(fake).mean() - critic(real).mean()

    loss_generator, loss_critic = losses()
    game.backward(generator=loss_generator, critic=loss_critic)
    expected = [
        *torch.autograd.grad(losses()[0], list(generator.parameters())),
        *torch.autograd.grad(losses()[1], list(critic.parameters())),
    ]
    assert all(torch.equal(p.grad, g) for p, g in zip(game.parameters(), expected, strict=True))


def test_equal_names_do_not_collide():
    game = Game({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    names = ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert [name for name, _ in game.named_parameters()] == names == list(game.state_dict())


def test_frozen_and_unused_parameters_get_no_gradient():
    game = Game({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    game["a"].bias.requires_grad_(False)
    game.backward(a=game["a"](torch.ones(2)).sum(), b=game["b"].weight.sum())
    assert game["a"].bias.grad is None and game["b"].bias.grad is None
    assert game["a"].weight.grad is not None and game["b"].weight.grad is not None


def test_three_players_reach_the_equilibrium():
    """L_i = x_i (x_{i+1} - x_{i+2}) + (x_i - i)^2 / 2: the equilibrium solves (I + J) x = (0, 1, 2) with J skew."""
    game = Game({name: player(0.0) for name in "abc"})
    optimizer = ExtraSGD(game.parameters(), lr=0.3)
    x = [part[0] for part in game.values()]

    def losses():
        return [x[i] @ (x[(i + 1) % 3] - x[(i + 2) % 3]) + (x[i] - i).square().sum() / 2 for i in range(3)]

    for _ in range(200):
        for half_step in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            game.backward(**dict(zip("abc", losses(), strict=True)))
            half_step()
    skew = torch.tensor([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
    expected = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + skew, torch.arange(3, dtype=torch.float64))
    # 200 iterations contract by about 0.75 each: float64's rounding is what is left.
    assert torch.cat(list(x)).detach().sub(expected).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"a": 1}, "players are a, b, losses are a"),
        ({}, "losses are none"),
        ({"a": 1, "b": 1, "c": 1}, "losses are a, b, c"),
        ({"a": 1, "b": 2}, "loss of a must be a Tensor, got 1"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "loss of a must be one number that depends on parameters"),
        ({"a": torch.ones(2, requires_grad=True), "b": 1}, "loss of a must be one number"),
    ],
)
def test_a_wrong_loss_is_named(losses, message):
    with pytest.raises(ValueError, match=message):
        Game({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}).backward(**losses)


def test_players_that_share_or_lack_parameters_are_refused():
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'first' and 'second' do"):
        Game({"first": shared, "second": nn.Sequential(shared)})
    with pytest.raises(ValueError, match="'idle' has none"):
        Game({"idle": nn.Tanh()})
    with pytest.raises(ValueError, match="players must be a Mapping"):
        Game([nn.Linear(1, 1)])


@pytest.mark.parametrize("name", ["self", "losses", "backward", "items", "training", "_modules", "forward", "a player"])
def test_any_word_is_a_players_name(name):
    p = torch.nn.ParameterList([torch.ones(2)])
    one = Game({name: p, "other": torch.nn.Linear(2, 1)})
    one.backward(**{name: (3 * p[0]).sum(), "other": one["other"](torch.ones(2)).sum()})
    assert torch.equal(p[0].grad, torch.full((2,), 3.0)) and one[name] is p
    assert set(one.state_dict()) == {f"{name}.0", "other.weight", "other.bias"}
    one.load_state_dict(one.state_dict())


@pytest.mark.parametrize("name", ["a.b", "", 3])
def test_a_name_that_parameters_names_cannot_hold_is_refused(name):
    with pytest.raises(ValueError, match=f"players must have names without a dot, got {name!r}"):
        Game({name: torch.nn.Linear(2, 1)})
