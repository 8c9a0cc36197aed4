"""hvd_qgenx: unbiased, adaptive, entropy-coded gradient exchange for Horovod, and distributed extra-gradient.

Importable without Horovod; what needs it says so when it is used. ``hvd_qgenx.ddp`` is the hook for
DistributedDataParallel. ``hvd_qgenx.backend`` is the name of the codec's
backend in use: "avx2" or "portable", the compiled core, or "specification", plain torch; ``gpu_backend()``
says which one vectors on a GPU have, and why.
"""

import importlib

from hvd_qgenx import backends
from hvd_qgenx.backends import gpu_backend
from hvd_qgenx.codec import Codec
from hvd_qgenx.compression import Compression
from hvd_qgenx.dual import QGenX
from hvd_qgenx.extragradient import ExtraAdam, ExtraGradient, ExtraSGD
from hvd_qgenx.games import Game
from hvd_qgenx.key import Key
from hvd_qgenx.levels import Levels
from hvd_qgenx.payload import PayloadError

# The function takes the place of the room of its name: an import of the room, later, leaves it there.
from hvd_qgenx.probe import probe
from hvd_qgenx.stock import check_horovod

__version__ = "0.1.0"
__all__ = [
    "Codec",
    "Compression",
    "DistributedOptimizer",
    "ExtraAdam",
    "ExtraGradient",
    "ExtraSGD",
    "Game",
    "Key",
    "Levels",
    "PayloadError",
    "QGenX",
    "gpu_backend",
    "probe",
]


def __getattr__(name: str):
    if name == "backend":
        return backends.name()
    if name == "ddp":
        return importlib.import_module("hvd_qgenx.ddp")
    if name == "elastic":
        check_horovod()
        return importlib.import_module("hvd_qgenx.elastic")
    if name != "DistributedOptimizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hvd_qgenx.distributed import DistributedOptimizer

    return DistributedOptimizer
