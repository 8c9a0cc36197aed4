"""What Communication makes of what it counts."""

import math
import time

import pytest
import torch

from hvd_qgenx.communication import PHASES, Communication


def _entropy(counts):
    """Of the magnitudes, and a bit for each sign."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum()) + float(shares.sum()) - float(counts[0]) / int(counts.sum())


def _counts(num_levels):
    return torch.randint(0, 1000, (num_levels + 1,), generator=torch.Generator().manual_seed(num_levels))


def test_entropy_is_that_of_all_symbols_under_one_codebook():
    communication = Communication()
    assert communication.entropy is None
    communication.count_symbols(torch.zeros(8, dtype=torch.int64))
    assert communication.entropy is None
    first, second = _counts(127), _counts(3)
    communication.count_symbols(first)
    communication.count_symbols(second)
    first[:4] += second
    # 128 logarithms of float64 in another order.
    assert communication.entropy == pytest.approx(_entropy(first), rel=1e-12)


def test_symbols_of_another_codebook_have_an_entropy_of_their_own():
    communication = Communication()
    first = _counts(7)
    second = torch.tensor([2 * int(first.sum()), 0, 0])
    communication.count_symbols(first)
    communication.start_codebook(1)
    communication.count_symbols(second)
    assert communication.entropy == pytest.approx(_entropy(first) / 3, rel=1e-12)
    assert communication.codebook_version == 1


def test_zeros_alone_have_no_entropy_and_one_level_alone_that_of_its_signs():
    communication = Communication()
    communication.count_symbols(torch.tensor([10, 0, 0]))
    assert communication.entropy == 0.0
    communication.start_codebook(1)
    communication.count_symbols(torch.tensor([0, 0, 10]))
    assert communication.entropy == 0.5


def test_an_adaptation_costs_the_bytes_sent_inside_it():
    communication = Communication()
    communication.count(torch.zeros(100, dtype=torch.uint8))
    with communication.adaptation():
        communication.count(torch.zeros(7, dtype=torch.int64))
    communication.count(torch.zeros(100, dtype=torch.uint8))
    assert communication.adaptations == 1 and communication.adaptation_bytes == 56 and communication.bytes_sent == 256
    assert 0.0 <= communication.adaptation_seconds < math.inf


def test_the_summary_is_one_line_with_what_there_is():
    communication = Communication()
    assert str(communication) == "0 exchanges, no bytes sent"
    communication.count(torch.zeros(1000, dtype=torch.uint8))
    communication.exchanges, communication.coordinates = 2, 2000
    assert str(communication) == "2 exchanges, 1,000 bytes sent, 4.00 bits per coordinate, 8.0x less than float32"
    communication.squared_error, communication.squared_norm = 1.0, 50.0
    communication.count_symbols(torch.tensor([0, 2]))
    communication.start_codebook(3)
    communication.adaptations, communication.adaptation_bytes, communication.adaptation_seconds = 2, 16640, 0.0123
    assert str(communication).endswith(
        "8.0x less than float32, relative variance 0.02, entropy of symbols 1.00 bits, "
        "codebook 3 (2 adaptations: 16,640 bytes, 0.012 s)"
    )


def test_time_is_counted_by_phase():
    communication = Communication()
    assert communication.seconds == {"encode": 0.0, "wait": 0.0, "decode": 0.0}
    with communication.measure("encode"):
        time.sleep(0.02)
    with pytest.raises(KeyError), communication.measure("wait"):
        raise KeyError
    seconds = communication.seconds
    assert seconds["encode"] >= 0.02 > seconds["wait"] > 0.0 and seconds["decode"] == 0.0


def test_phases_are_ranges_of_torchs_profiler_while_it_runs():
    communication = Communication()
    with communication.measure("wait"):
        pass
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for phase in PHASES:
            with communication.measure(phase):
                torch.zeros(3).add_(1)
    names = [event.name for event in profile.events() if event.name.startswith("hvd_qgenx.")]
    assert names == ["hvd_qgenx.encode", "hvd_qgenx.wait", "hvd_qgenx.decode"]
