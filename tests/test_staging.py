"""Vectors on a device without kernels: copies and their order, on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.cuda.device import DeviceError
from hvd_qgenx.backends.cuda.staging import AHEAD, Staged

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from cases import Case, compare, compare_damaged
from late import Late, Prompt


def test_what_is_staged_has_the_core_s_bytes_means_and_refusals():
    staged, core = Staged(Prompt()), Compiled(best_path())
    for number in range(200):
        assert compare(Case(number), staged, core) == "", number
        assert compare_damaged(Case(number), staged, core)[0] == "", number


CODEC = Codec(Levels.uniform(4))
SIZES = (3000, 1500, 5, 4000, 2500)


def _groups():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(size, generator=generator), torch.randn(7, generator=generator)] for size in SIZES]


def _encode(backend, segments, rank=0):
    layout = CODEC.layout(list(map(len, segments)))
    out = torch.zeros(CODEC.bound(layout.numel, layout.sizes), dtype=torch.uint8)
    drawn = backend.encode(CODEC.codebook, CODEC.norm, layout, Key(0, rank, 0), segments, out, False)
    return out[: drawn.size]


def test_the_next_groups_are_fetched_before_the_first_is_waited_for():
    device, groups = Late(), _groups()
    staged, core = Staged(device), Compiled(best_path())
    with staged.announced(groups):
        assert device.log[-1] == ("start", AHEAD - 1), "nothing waits while the first ones are started"
        for number, group in enumerate(groups):
            assert torch.equal(_encode(staged, group), _encode(core, group))
            started = max(count for what, count in device.log if what == "start")
            assert started == min(number + AHEAD, len(groups) - 1)
    assert [entry for entry in device.log if entry[0] != "pinned"] == [
        ("start", 0), ("start", 1), ("start", 2), ("done", 0), ("start", 3), ("done", 1), ("start", 4), ("done", 2),
        ("done", 3), ("done", 4),
    ]  # fmt: skip


def test_memory_is_kept_from_one_exchange_to_the_next():
    device, groups = Late(), _groups()
    staged = Staged(device)
    for _ in range(6):
        with staged.announced(groups):
            for group in groups:
                _encode(staged, group)
    sizes = [size for what, size in device.log if what == "pinned"]
    # A slot grows until it has held the largest group: three slots, which groups reach in another order each time.
    assert len(sizes) <= 3 * 3 and max(sizes) == 4 * (4000 + 7)
    device.log.clear()
    with staged.announced(groups):
        for group in groups:
            _encode(staged, group)
    assert "pinned" not in [what for what, _ in device.log]


def test_what_was_announced_and_not_encoded_is_not_taken_for_what_comes():
    staged, core, groups = Staged(Late()), Compiled(best_path()), _groups()
    with staged.announced(groups):
        _encode(staged, groups[0])
    groups[1][0].mul_(2.0)
    assert torch.equal(_encode(staged, groups[1]), _encode(core, groups[1]))


def test_groups_that_come_in_another_order_are_fetched_anew():
    staged, core, groups = Staged(Late()), Compiled(best_path()), _groups()
    with staged.announced(groups):
        for group in reversed(groups):
            assert torch.equal(_encode(staged, group), _encode(core, group))


def test_a_slot_of_means_is_not_written_before_its_last_copy_is_done():
    device = Late()
    staged, core = Staged(device), Compiled(best_path())
    payloads = [_encode(core, [torch.randn(2000)], rank) for rank in range(5)]
    expected, targets = [torch.empty(2000) for _ in payloads], [torch.full((2000,), 7.0) for _ in payloads]
    for payload, mean, target in zip(payloads, expected, targets, strict=True):
        core.decode_mean(CODEC.codebook, [payload], [mean])
        staged.decode_mean(CODEC.codebook, [payload], [target])
    assert [bool((target == 7.0).all()) for target in targets] == [False, False, False, True, True]
    for _, pairs in device.left:
        for target, source in pairs:
            target.copy_(source)
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))


def test_a_target_that_no_payload_has_is_left_as_it_is():
    staged, payload = Staged(Prompt()), _encode(Compiled(best_path()), [torch.randn(2000), torch.zeros(0)])
    targets = [torch.full((2000,), 7.0), torch.full((10,), 7.0)]
    staged.decode_mean(CODEC.codebook, [payload], targets)
    assert not (targets[0] == 7.0).any() and (targets[1] == 7.0).all()


def test_a_device_that_goes_away_is_named_in_one_sentence(monkeypatch):
    staged = Staged(Prompt())

    def lost(*arguments):
        raise torch.AcceleratorError("CUDA error: device lost\nSearch for the code")

    monkeypatch.setattr(staged.device, "copy_aside", lost)
    with pytest.raises(DeviceError, match=r"^prompt, staged failed: CUDA error: device lost$"):
        _encode(staged, _groups()[0])
