"""train/wgan.py's run, cut off at any move and taken up again, on several ranks."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from ranks import gathered, same_on_all_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "train"))
import checkpoint
import evaluation
import wgan
from fid import Moments
from settings import parse_flags

RUNNING, STOPPED = SimpleNamespace(asked=False), SimpleNamespace(asked=True)
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
SMALL = ["--width", "4", "--latent", "8", "--batch", str(2 * hvd.size())]


def begun(*flags: str, content=None) -> wgan.Training:
    training = wgan.Training(parse_flags("", [*SMALL, *flags]), IMAGES)
    training.begin(content)
    return training


def state(training: wgan.Training) -> list[torch.Tensor]:
    return [*training.game.parameters(), *training.average.parameters()]


@pytest.mark.parametrize("optimizer", ["extra_adam", "past_extra_adam", "qgenx", "adam"])
@pytest.mark.parametrize("moves", [1, 2])
def test_a_run_cut_off_after_any_move_goes_on_bit_for_bit(tmp_path, optimizer, moves):
    flags = ["--optimizer", optimizer, "--compression", "qgenx:adapt_at=0+1+2"]
    whole = begun(*flags)
    for _ in range(4):
        assert whole.iterate(RUNNING)
    cut = begun(*flags)
    # One rank is asked to stop; all do, before the same move.
    stops = iter([False] * moves + [hvd.rank() == hvd.size() - 1])
    stop = type("StopsAfterMoves", (), {"asked": property(lambda self: next(stops))})()
    while cut.iterate(stop):
        pass
    assert cut.moves == moves
    path = checkpoint.save(tmp_path, cut.moves, cut.content(1.5))
    resumed = begun(*flags, content=checkpoint.load(path))
    while resumed.iteration < 4:
        assert resumed.iterate(RUNNING)
    assert all(map(torch.equal, state(whole), state(resumed)))
    assert torch.equal(whole.losses, resumed.losses)
    assert same_on_all_ranks(state(resumed))


def test_counters_continue_where_the_checkpoint_left_them(tmp_path):
    cut = begun()
    cut.iterate(RUNNING)
    before = cut.method.counted()
    resumed = begun(content=checkpoint.load(checkpoint.save(tmp_path, cut.moves, cut.content(0.0))))
    assert resumed.method.counted() == before
    resumed.iterate(RUNNING)
    assert resumed.method.counted()["exchanges"] == 2 * before["exchanges"]


def test_alternating_players_step_as_often_as_asked_and_send_their_own_bytes_only():
    training = begun("--optimizer", "adam", "--critic-steps", "3", "--compression", "none")
    before = {player: copy.deepcopy(list(training.game[player].parameters())) for player in training.game}
    training.iterate(RUNNING)
    generator_opt, critic_opt = training.method.optimizers
    assert (generator_opt.communication.exchanges, critic_opt.communication.exchanges) == (1, 3)
    assert critic_opt.communication.coordinates == 3 * sum(p.numel() for p in training.critic.parameters())
    for player, old in before.items():
        assert not all(map(torch.equal, old, training.game[player].parameters()))


def test_statistics_of_shares_add_up_to_those_of_all_features():
    features = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    mine = evaluation.share(11)
    together = evaluation._together(features[mine.start : mine.stop])
    whole = Moments.of(features)
    assert together.moments.count == 11 and torch.equal(together.rows, features)
    torch.testing.assert_close(together.moments.first, whole.first, rtol=1e-14, atol=1e-14)  # another order of adding
    torch.testing.assert_close(together.moments.second, whole.second, rtol=1e-14, atol=1e-14)


def test_samples_do_not_depend_on_the_number_of_ranks():
    training = begun()
    share = evaluation.share(7)
    parts = gathered(evaluation.generate(training.average, 8, 5, share, "cpu"))
    alone = evaluation.generate(training.average, 8, 5, range(7), "cpu")
    # Convolutions of another batch may round otherwise, by one step of 255 at the most.
    assert np.abs(np.concatenate(parts).astype(int) - alone).max() <= 1
