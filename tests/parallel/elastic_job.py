"""A job whose ranks come and go, until a file says stop; every rank writes a line after each batch.

`elastic_job.py FOLDER KIND`. Started by tests/test_elastic.py.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from torch.optim.swa_utils import AveragedModel

import hvd_qgenx

FOLDER, KIND = Path(sys.argv[1]), sys.argv[2]
hvd.init()
torch.set_num_threads(1)
torch.manual_seed(os.getpid())  # ranks that join have to take over the parameters

game = hvd_qgenx.Game({"first": torch.nn.Linear(40, 40), "second": torch.nn.Linear(40, 3)})
average = AveragedModel(game)
sampler = hvd.elastic.ElasticSampler(range(10**6))
compressor = hvd_qgenx.Compression.qgenx(bits=4, seed=1, adapt_at=(0, 5, 20))
OPTIMIZERS = {
    "extra_adam": lambda: hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraAdam(game.parameters(), lr=1e-3), game.named_parameters(), compression=compressor
    ),
    "none": lambda: hvd_qgenx.DistributedOptimizer(
        torch.optim.Adam(game.parameters(), lr=1e-3), game.named_parameters()
    ),
    "dual": lambda: hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.QGenX(game.parameters(), step_scale=0.01), game.named_parameters(), compression=compressor
    ),
    "drop-in": lambda: hvd.DistributedOptimizer(
        torch.optim.Adam(game.parameters(), lr=1e-3), game.named_parameters(), compression=compressor
    ),
}
optimizer = OPTIMIZERS[KIND]()


def backward():
    data = torch.randn(8, 40)
    game.backward(first=game["first"](data).square().mean(), second=game["second"](data).square().mean())


def fingerprint(values) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def observed() -> dict:
    """What must be equal on all ranks."""
    memory = compressor.state_dict() if KIND == "drop-in" else optimizer._exchange.state_dict()
    return {
        "parameters": fingerprint(game.parameters()),
        "average": fingerprint(average.parameters()),
        "exchanges": memory["step"],
        "levels": memory.get("levels"),
        "processed": sampler.processed_num,
    }


@hvd_qgenx.elastic.run
def train(state):
    while not hvd.broadcast_object((FOLDER / "stop").exists(), root_rank=0):
        if hasattr(getattr(optimizer, "optimizer", None), "extrapolation"):
            optimizer.zero_grad()
            backward()
            optimizer.extrapolation()
        optimizer.zero_grad()
        backward()
        optimizer.step()
        average.update_parameters(game)
        sampler.record_batch(state.batch, 8)
        state.batch += 1
        everywhere = hvd.allgather_object(observed())
        line = {
            "rank": hvd.rank(), "size": hvd.size(), "pid": os.getpid(), "batch": state.batch,
            "equal": all(other == everywhere[0] for other in everywhere), **everywhere[hvd.rank()],
            "num_ranks": getattr(getattr(optimizer, "optimizer", None), "num_ranks", None),
        }  # fmt: skip
        with (FOLDER / "lines").open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        state.commit()
        time.sleep(0.05)


train(
    hvd_qgenx.elastic.State(
        game=game, optimizer=optimizer, compressor=compressor, average=average, sampler=sampler, batch=0
    )
)
