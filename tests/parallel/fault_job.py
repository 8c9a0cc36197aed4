"""A job in which rank 1 does something wrong after three exchanges; every other rank writes what it is told.

`fault_job.py FOLDER FAULT`. Started by tests/test_faults.py.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import horovod.torch as hvd
import torch

import hvd_qgenx
from hvd_qgenx.transports import Patience

FOLDER, FAULT = Path(sys.argv[1]), sys.argv[2]
WRONG = 1
AT = 3

hvd.init()
torch.set_num_threads(1)
torch.manual_seed(0)
# The launcher ends all ranks once one of them has failed; these have something to write first.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
model = torch.nn.Linear(40, 40)
optimizer = hvd_qgenx.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1),
    model.named_parameters(),
    compression=hvd_qgenx.Compression.qgenx(bits=4),
    timeout=4.0,
)
optimizer._exchange.transport.patience = Patience(4.0, tell_after=0.5, log_after=1.5)


def do_wrong():
    (FOLDER / "wrong").write_text(str(os.getpid()))
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "raises":
        raise RuntimeError("of the user's own")
    if FAULT == "leaves":
        sys.exit(0)
    if FAULT == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if FAULT == "absent":
        time.sleep(12)
        os._exit(0)
    if FAULT == "cut":
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    if FAULT == "preempted":
        # What a batch system does to a rank that waits for the others; rank 0 is late for that.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()


def train():
    global start
    for step in range(AT + 2):
        start = time.monotonic()
        optimizer.zero_grad()
        model(torch.randn(4, 40)).square().mean().backward()
        if step == AT and hvd.rank() == WRONG:
            do_wrong()
        if step == AT and hvd.rank() == 0 and FAULT == "preempted":
            time.sleep(4)
        optimizer.step()


def tell(**told):
    (FOLDER / f"rank{hvd.rank()}").write_text(json.dumps(told))


start = time.monotonic()
try:
    train()
except Exception as error:
    names = [kind.__name__ for kind in type(error).__mro__]
    tell(kinds=names, text=str(error), seconds=time.monotonic() - start)
    os._exit(1)
except SystemExit:
    tell(kinds=["SystemExit"], text="", seconds=time.monotonic() - start)
    raise
tell(kinds=[], text="", seconds=time.monotonic() - start)
