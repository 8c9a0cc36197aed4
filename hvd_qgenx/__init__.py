"""hvd_qgenx: unbiased, adaptive, entropy-coded gradient exchange for Horovod, and distributed extra-gradient.

Importable without Horovod; what needs it says so when it is used. ``hvd_qgenx.backend`` is the name of the codec's
backend in use: "avx2" or "portable", the compiled core, or "reference", plain torch.
"""

from hvd_qgenx import core
from hvd_qgenx.codec import Codec
from hvd_qgenx.compression import Compression
from hvd_qgenx.dual import QGenX
from hvd_qgenx.extragradient import ExtraAdam, ExtraGradient, ExtraSGD
from hvd_qgenx.games import Game
from hvd_qgenx.levels import Levels
from hvd_qgenx.payload import PayloadError
from hvd_qgenx.quantize import Key

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
]


def __getattr__(name: str):
    if name == "backend":
        return core.backend.name
    if name != "DistributedOptimizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hvd_qgenx import exchange  # noqa: F401  says how to get Horovod, if it is not there
    from hvd_qgenx.distributed import DistributedOptimizer

    return DistributedOptimizer
