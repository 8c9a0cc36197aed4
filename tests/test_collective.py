"""Messages: their size classes, and how they are found in what an allgather returns."""

import pytest
import torch

from hvd_qgenx.collective import Record, _split, size_class


def test_size_classes_cost_little_and_grow():
    sizes = range(1, 100_000)
    classes = [size_class(size) for size in sizes]
    assert classes == sorted(classes)
    assert all(size <= padded < size * (1 + 2.0**-6) + 16 for size, padded in zip(sizes, classes, strict=True))
    assert all(size_class(padded) == padded for padded in classes)
    assert len(set(classes)) < 700, "few classes, so that a message keeps its length from step to step"


@pytest.mark.parametrize("lengths", [(0,), (5, 0, 1000), (1, 1, 1), (100_000, 3)])
def test_messages_of_any_length_are_found_again(lengths):
    bodies = [torch.randint(0, 256, (length,), dtype=torch.uint8) for length in lengths]
    records = [Record(1, step, "extrapolation", step / 3, first=7) for step in range(len(lengths))]
    gathered = [torch.zeros(size_class(56 + length), dtype=torch.uint8) for length in lengths]
    for buffer, record, body in zip(gathered, records, bodies, strict=True):
        message = record.pack(body)
        buffer[: len(message)] = message
    found = [Record.unpack(message) for message in _split(torch.cat(gathered))]
    assert [record for record, _ in found] == records
    assert all(torch.equal(body, other) for (_, body), other in zip(found, bodies, strict=True))
