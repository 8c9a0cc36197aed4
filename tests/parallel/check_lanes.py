"""Horovod joins operations of one dtype that wait at once: what travels in lanes does not wait for the others."""

from pathlib import Path

import horovod.torch as hvd
import torch

from hvd_qgenx.transports.horovod import HorovodTransport

RANKS = hvd.size()


def _joined(tmp_path, lanes) -> bool:
    """Whether Horovod copies operations of these lanes, which wait at the same time, into one; from its timeline."""
    transport = HorovodTransport()
    path = f"{tmp_path}/timeline-{hvd.rank()}.json"
    hvd.start_timeline(path)
    for round_ in range(10):
        message = torch.zeros(2**16, dtype=torch.uint8)
        pending = [transport.allgather(message, f"lanes.{lanes}.{i}", lane) for i, lane in enumerate(lanes)]
        for operation in pending:
            operation.begin()
        assert all(len(operation.wait()) == RANKS * 2**16 for operation in pending), round_
    hvd.barrier()
    hvd.stop_timeline()
    found = "MEMCPY_IN_FUSION_BUFFER" in Path(path).read_text() if hvd.rank() == 0 else None
    return hvd.broadcast_object(found, name="joined")


def test_parts_that_wait_at_the_same_time_arrive_one_by_one(tmp_path):
    assert not _joined(tmp_path, (0, 1, 2, 3, 4))
    assert _joined(tmp_path, (0, 0, 0, 0, 0)), "and the timeline tells: of one lane they are joined"
