"""Levels follow gradients that change: in ten drills, by both plans, in parts that start ahead, and exactly resumed."""

import copy
import importlib
import sys
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered

from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.exchange import CodedExchange
from hvd_qgenx.exchange.ahead import AheadExchange
from hvd_qgenx.transports.horovod import HorovodTransport

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
drills = importlib.import_module("drills")
MOST = 1.25  # of a fresh fit's variance


def _exchange(kind=CodedExchange, bits=4, **options):
    made = kind(Settings(bits=bits), HorovodTransport(), **options)
    made.describe(["a"], [torch.float32], [drills.NUMEL])
    return made


def _iterate(exchange, vector):
    fused = exchange.fuse([vector.clone()])
    exchange.settle()
    exchange.adapt_if_due(fused)
    return exchange.collect(exchange.submit(fused, "step"), ["a"])


def _total(pair):
    """The ratio of two numbers, each summed over ranks in their order."""
    pairs = gathered(pair)
    error, norm = (sum(one[i] for one in pairs) for i in range(2))
    return error / norm


def _fresh(settings, vector):
    """The codec of levels fitted to these very gradients of all ranks."""
    codec = settings.codec()
    own = Statistics.measure(codec, [vector], codec.layout((len(vector),)))
    return settings.codec(*fit(Statistics.merged(gathered(own)), settings.bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("drill", drills.DRILLS)
def test_from_the_fifth_iteration_on_levels_are_nearly_as_good_as_new_ones(drill, bits):
    exchange = _exchange(bits=bits)
    for iteration in range(drills.FIFTH + 3):
        vector = drills.gradient(drill, hvd.rank(), iteration)
        _iterate(exchange, vector)
        if iteration in (drills.FIFTH, drills.FIFTH + 2):
            found = _total(drills.exact_error(exchange.codec, vector))
            best = _total(drills.exact_error(_fresh(exchange.settings, vector), vector))
            assert found <= MOST * best
    assert exchange.communication.adaptations <= 3
    states = gathered(exchange.state_dict())
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("options", [{"plan": "two_phase", "part_bytes": 2**17}, {"part_bytes": 2**17}])
@pytest.mark.parametrize("drill", ["zeros, then normal", "one-hot, then normal", "normal, then constant"])
def test_every_plan_and_parts_follow_too(drill, options):
    exchange = _exchange(AheadExchange, **options)
    for iteration in range(drills.FIFTH + 3):
        vector = drills.gradient(drill, hvd.rank(), iteration)
        for part in range(1, len(exchange.parts())):
            # Ranks need not start the same parts, and do not: a refit that is due must keep both from it alike.
            if (part + hvd.rank()) % 2:
                exchange.start(part, [vector], "step")
        _iterate(exchange, vector)
    versions = gathered((exchange.version, exchange.codec.codebook.hash, exchange.mean_codec.codebook.hash))
    assert len(set(versions)) == 1
    assert versions[0][0] == (1 if drill.startswith("zeros") else 2)
    vector = drills.gradient(drill, hvd.rank(), iteration)
    found = _total(drills.exact_error(exchange.codec, vector))
    assert found <= MOST * _total(drills.exact_error(_fresh(exchange.settings, vector), vector))


def _two_phase_means(exchange, alike):
    """Means of vectors that are equal on all ranks, or cancel but for one coordinate of each bucket."""
    vector = drills.normal(torch.Generator().manual_seed(exchange.step))
    if not alike:
        vector = vector * (1.0 if hvd.rank() % 2 else -1.0)
        vector.view(-1, 1024)[:, 3] = 2.0
    _iterate(exchange, vector)


@pytest.mark.skipif(hvd.size() % 2 == 1, reason="opposite gradients cancel on an even number of ranks")
def test_levels_of_the_second_rounding_follow_the_mean():
    exchange = _exchange(plan="two_phase")
    for _ in range(4):
        _two_phase_means(exchange, alike=True)
    before, version = exchange.mean_codec.codebook.hash, exchange.version
    for _ in range(5):
        _two_phase_means(exchange, alike=False)
    hashes = gathered(exchange.mean_codec.codebook.hash)
    assert len(set(hashes)) == 1 and hashes[0] != before
    assert exchange.version <= version + 1


def test_a_run_that_resumes_between_drift_and_refit_continues_exactly():
    drill, ends = "one-hot, then normal", []
    for resumed_at in (None, drills.CHANGE + 1, drills.CHANGE + 2):
        exchange = _exchange()
        for iteration in range(drills.CHANGE + 5):
            if iteration == resumed_at:
                state = copy.deepcopy(exchange.state_dict())
                exchange = _exchange()
                if hvd.rank() or iteration % 2:  # or late, and then given it by the others
                    exchange.load_state_dict(state)
            mean = _iterate(exchange, drills.gradient(drill, hvd.rank(), iteration)).means[0]
        ends.append((mean.clone(), exchange.state_dict()))
    assert all(torch.equal(ends[0][0], end) and state == ends[0][1] for end, state in ends[1:])
    assert ends[0][1]["version"] == 2


def test_levels_that_are_not_adaptive_stay():
    for options in ({"levels": "exponential"}, {"adapt_at": (), "adapt_every": 0}):
        exchange = CodedExchange(Settings(**options), HorovodTransport())
        exchange.describe(["a"], [torch.float32], [drills.NUMEL])
        for iteration in range(drills.CHANGE + 4):
            _iterate(exchange, drills.gradient("one-hot, then normal", hvd.rank(), iteration))
        assert exchange.version == 0 and exchange.communication.adaptations == 0
