"""The blocks of docs/training.md, run as they stand on several ranks."""

import copy
import re
import warnings
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import connection, exchange

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
RECIPES = dict(re.findall(r"```python\n# recipe: (\w+)\n(.*?)```", PAGE, re.S))
RUN = set()


def run(recipe: str, **names) -> dict:
    """Executes a block with these names beside those that the page assumes; returns all names afterwards."""
    RUN.add(recipe)
    names = {"hvd": hvd, "hvd_qgenx": hvd_qgenx, "torch": torch, "iterations": 3, **names}
    exec(RECIPES[recipe], names)
    return names


class Task:
    """A network that is equal on all ranks, and this rank's own minibatches."""

    def __init__(self, compression="none", make=hvd_qgenx.ExtraAdam):
        self.model = network()
        self.initial = copy.deepcopy(self.model.state_dict())
        compression = hvd_qgenx.Compression.qgenx(bits=4) if compression == "qgenx" else hvd_qgenx.Compression.none
        self.opt = hvd_qgenx.DistributedOptimizer(
            make(self.model.parameters(), lr=1e-2), self.model.named_parameters(), compression=compression
        )
        self.batches, self.size = [], 8

    def loss(self):
        self.batches.append(torch.randn(self.size, 40))
        return self.model(self.batches[-1]).square().mean()

    @property
    def names(self):
        return {"model": self.model, "opt": self.opt, "loss": self.loss}

    def moved(self):
        return any(not torch.equal(value, self.initial[name]) for name, value in self.model.state_dict().items())


@pytest.fixture(params=["none", "qgenx"])
def task(request):
    return Task(request.param)


def test_clipping_bounds_the_mean_on_all_ranks(task):
    run("clipping", **task.names)
    norm = torch.cat([p.grad.reshape(-1) for p in task.model.parameters()]).norm()
    # clip_grad_norm_ divides by the norm plus 1e-6.
    assert 0.00999 < float(norm) < 0.01001 and len(set(gathered(float(norm)))) == 1
    assert task.opt.communication.exchanges == 6 and task.moved()
    assert same_on_all_ranks(task.model.parameters())


def test_accumulation_is_one_exchange_of_the_large_batch():
    task, whole = Task(make=hvd_qgenx.ExtraSGD), Task(make=hvd_qgenx.ExtraSGD)
    run("accumulation", **task.names, passes=4, iterations=1)
    for index, half_step in enumerate((whole.opt.extrapolation, whole.opt.step)):
        whole.opt.zero_grad()
        whole.model(torch.cat(task.batches[4 * index : 4 * index + 4])).square().mean().backward()
        half_step()
    for p, q in zip(task.model.parameters(), whole.model.parameters(), strict=True):
        # The gradients at x_{t+1/2}. float32 sums of 32 samples in another order: 2e-7 of the largest, measured.
        assert (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max()
    assert task.opt.communication.exchanges == 2 and len(task.batches) == 8
    assert same_on_all_ranks(task.model.parameters())


@pytest.mark.parametrize("broken_at", [{2}, {3}, {0, 1, 5}])
def test_a_grad_scaler_skips_half_steps_on_all_ranks(task, broken_at):
    """Rank 1's gradient overflows at some backwards: exactly these half-steps are not made, and scales halve alike."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    calls, points = [], []

    def loss():
        # What the last half-step, if it was made, has left.
        points.append(torch.cat([p.detach().reshape(-1) for p in task.model.parameters()]))
        calls.append(task.opt.extrapolated)
        value = task.loss().float()
        return value * float("inf") if len(calls) - 1 in broken_at and hvd.rank() == 1 else value

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not finite on some rank.*")
        run("amp", **{**task.names, "loss": loss}, scaler=scaler, device="cpu", iterations=2)
    assert len(calls) == 4 + len(broken_at)
    moved = [not torch.equal(a, b) for a, b in zip(points, points[1:], strict=False)]
    assert moved == [index not in broken_at for index in range(len(moved))]
    due = [False, True] * 4
    assert calls == [due[index - sum(b < index for b in broken_at)] for index in range(len(calls))]
    assert set(gathered(scaler.get_scale())) == {2.0 ** (10 - len(broken_at))}
    assert same_on_all_ranks(task.model.parameters())


def test_a_schedule_moves_the_learning_rate_of_both_half_steps(task):
    seen, half_steps = [], {"extrapolation": task.opt.optimizer.extrapolation, "step": task.opt.optimizer.step}
    for name, half_step in half_steps.items():

        def noting(*arguments, half_step=half_step):
            seen.append(task.opt.param_groups[0]["lr"])
            return half_step(*arguments)

        setattr(task.opt.optimizer, name, noting)
    run("schedule", **task.names)
    expected = [1e-2, 1e-2, 0.75e-2, 0.75e-2, 0.25e-2, 0.25e-2]  # (1 + cos(pi t / 3)) / 2
    assert seen == pytest.approx(expected, rel=1e-12)
    assert task.opt.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert same_on_all_ranks(task.model.parameters())


def test_the_past_needs_half_the_exchanges(task):
    names = run("past", **task.names)
    assert names["opt"].communication.exchanges == 3 == len(task.batches)
    assert same_on_all_ranks(task.model.parameters()) and task.moved()


def test_the_average_is_shown_and_put_back(task):
    shown = []
    run("average", **task.names, evaluate=lambda model: shown.extend(p.detach().clone() for p in model.parameters()))
    assert same_on_all_ranks(shown) and same_on_all_ranks(task.model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(shown, task.model.parameters(), strict=True))


def test_a_game_of_two_networks_with_equal_names():
    torch.manual_seed(hvd.rank())
    generator = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40))
    critic = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    names = run(
        "game",
        generator=generator,
        critic=critic,
        noise=lambda: torch.randn(8, 6),
        real=lambda: torch.randn(8, 40),
    )
    assert names["opt"].communication.exchanges == 6
    assert same_on_all_ranks(names["game"].parameters())


@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("make", ["adam", "past", "dual_extrapolation", "optimistic"])
def test_a_checkpoint_file_of_rank_0_continues_bit_for_bit(tmp_path, make, halfway):
    makes = {
        "adam": hvd_qgenx.ExtraAdam,
        "past": lambda p, lr: hvd_qgenx.ExtraAdam(p, lr=lr, past=True),
        "dual_extrapolation": lambda p, lr: hvd_qgenx.QGenX(p, step_scale=lr),
        "optimistic": lambda p, lr: hvd_qgenx.QGenX(p, method="optimistic", step_scale=lr),
    }
    task, other = Task("qgenx", makes[make]), Task("qgenx", makes[make])
    _half_steps(task, 4 + halfway)
    run("save", **task.names, path=tmp_path / "checkpoint.pt")
    run("load", **other.names, path=tmp_path / "checkpoint.pt")
    for each in (task, other):
        torch.manual_seed(5 + hvd.rank())
        _half_steps(each, 3)
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True))
    assert same_on_all_ranks(task.model.parameters())


def _half_steps(task, count):
    for _ in range(count):
        task.opt.zero_grad()
        task.loss().backward()
        task.opt.step() if task.opt.extrapolated else task.opt.extrapolation()


def test_overlap_ends_in_the_bits_of_the_same_parts_without_it(monkeypatch):
    monkeypatch.setattr(connection, "PART_BYTES", 4096)  # the network has 14 KB
    ends = []
    for recipe in (RECIPES["overlap"], RECIPES["overlap"].replace("overlap=True", "overlap=False")):
        task = Task()
        monkeypatch.setitem(RECIPES, "overlap", recipe)
        monkeypatch.setattr(exchange.CodedExchange, "_parts", _parts_of_4096_bytes)
        torch.manual_seed(5 + hvd.rank())
        names = run("overlap", **task.names, passes=2)
        assert names["opt"].communication.exchanges == 3 and len(task.batches) == 6
        assert same_on_all_ranks(task.model.parameters()) and task.moved()
        ends.append(torch.cat([p.detach().reshape(-1) for p in task.model.parameters()]))
    assert torch.equal(*ends)


def _parts_of_4096_bytes(self):
    return self.codec.layout(self.sizes).parts(4096)


def test_a_hierarchy_counts_what_stays_within_the_host(task):
    names = run("hierarchical", **task.names)
    assert names["opt"].communication.exchanges == 6 and names["opt"].communication.host_bytes > 0
    assert same_on_all_ranks(task.model.parameters()) and task.moved()


def test_every_recipe_was_run():
    """The last test of the file."""
    assert set(RECIPES) == RUN
