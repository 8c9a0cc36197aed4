"""Messages: their size classes, how they are found in what an allgather returns, and which are refused."""

import pytest
import torch

from hvd_qgenx.drift import Sums
from hvd_qgenx.exchange.message import (
    ENVELOPE_BYTES,
    DisagreementError,
    Envelope,
    compare,
    room_for,
    seal,
    size_class,
    split,
)


def test_size_classes_cost_little_and_grow():
    sizes = range(1, 100_000)
    classes = [size_class(size) for size in sizes]
    assert classes == sorted(classes)
    assert all(size <= padded < size * (1 + 2.0**-6) + 16 for size, padded in zip(sizes, classes, strict=True))
    assert all(size_class(padded) == padded for padded in classes)
    assert len(set(classes)) < 700, "few classes, so that a message keeps its length from step to step"


def _message(envelope, body):
    buffer = room_for(len(body) + 1000)  # a kept buffer has room for longer ones
    buffer.fill_(255)
    buffer[ENVELOPE_BYTES : ENVELOPE_BYTES + len(body)] = body
    return seal(envelope, buffer, len(body))


@pytest.mark.parametrize("lengths", [(0,), (5, 0, 1000), (1, 1, 1), (100_000, 3)])
def test_messages_of_any_length_are_found_again(lengths):
    bodies = [torch.randint(0, 256, (length,), dtype=torch.uint8) for length in lengths]
    envelopes = [
        Envelope(1, step, "extrapolation", step / 3, 7, 4095, 1, Sums(step / 7, 1e300, (0, 1, 2**40, step), 5e-324))
        for step in range(len(lengths))
    ]
    messages = [_message(envelope, body) for envelope, body in zip(envelopes, bodies, strict=True)]
    assert [len(message) for message in messages] == [size_class(ENVELOPE_BYTES + length) for length in lengths]
    found, others = split(torch.cat(messages))
    assert found == envelopes
    assert all(torch.equal(body, other) for body, other in zip(bodies, others, strict=True))


def test_padding_holds_nothing_of_an_earlier_message():
    message = _message(Envelope(1, 2, "step"), torch.ones(3, dtype=torch.uint8))
    assert not message[ENVELOPE_BYTES + 3 :].any()


ENVELOPE = Envelope(1, 2, "step", 0.5, 3, 4, 0)


@pytest.mark.parametrize("flip", [1, 0x80, 0xFF])
@pytest.mark.parametrize("place", range(ENVELOPE_BYTES))
def test_a_damaged_envelope_is_refused_by_the_name_of_its_rank(place, flip):
    """Every byte of it: magic, version, stage, lengths, numbers, sums and the checksum itself."""
    good = _message(ENVELOPE, torch.zeros(50, dtype=torch.uint8))
    bad = good.clone()
    bad[place] ^= flip
    wanted = "rank 1 speaks another language" if place < 6 else "the envelope of rank 1 is damaged"
    with pytest.raises(DisagreementError, match=wanted):
        split(torch.cat((good, bad, good)))


def test_an_envelope_whose_checksum_is_right_may_still_not_claim_what_is_not_there():
    short = seal(ENVELOPE, room_for(1000), 1000)[: ENVELOPE_BYTES + 10]
    with pytest.raises(DisagreementError, match="the envelope of rank 0 is damaged: stage 0, 1112 bytes"):
        split(short)


@pytest.mark.parametrize("length", [8, ENVELOPE_BYTES, 1000])
def test_bytes_of_a_stranger_are_refused(length):
    with pytest.raises(DisagreementError, match="rank 0"):
        split(torch.zeros(length, dtype=torch.uint8))


def test_another_version_is_named():
    message = _message(ENVELOPE, torch.zeros(50, dtype=torch.uint8))
    message[4] = 9
    with pytest.raises(DisagreementError, match=r"version 9, this library's .* version 2; install one version"):
        split(message)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Envelope(2, 2, "step", part=4), "rank 0 one that is not known here .*, rank 1 one that is not known here"),
        (Envelope(1, 3, "step", part=4), r"rank 0 is at exchange 2 \(step\), rank 1 at exchange 3 \(step\)"),
        (Envelope(1, 2, "agreement", part=4), r"rank 1 at exchange 2 \(agreement\)"),
        (Envelope(1, 2, "step", part=5), "rank 1 part 5 of phase 0"),
        (Envelope(1, 2, "step", part=4, phase=1), "rank 1 part 4 of phase 1"),
    ],
)
def test_messages_of_different_exchanges_are_told_apart(other, named):
    with pytest.raises(DisagreementError, match=named):
        compare([ENVELOPE, other], [0, 1])


def test_a_message_too_many_or_too_few_is_refused():
    with pytest.raises(DisagreementError, match="2 messages arrived, from 3 ranks"):
        compare([ENVELOPE, ENVELOPE], [0, 1, 2])


def test_ranks_are_named_by_their_numbers_in_the_whole_job():
    with pytest.raises(DisagreementError, match=r"rank 4 is at exchange 2 \(step\), rank 9 at exchange 3"):
        compare([ENVELOPE, Envelope(1, 3, "step", part=4)], [4, 9])
    with pytest.raises(DisagreementError, match="the message of rank 9 has 8 bytes"):
        split(
            torch.cat((_message(ENVELOPE, torch.zeros(50, dtype=torch.uint8)), torch.zeros(8, dtype=torch.uint8))),
            [4, 9],
        )


def test_those_that_agree_compare_their_words_first():
    compare([Envelope(1, 0, "agreement"), Envelope(2, 0, "agreement")], [0, 1])
