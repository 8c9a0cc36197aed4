"""Imports point one way, and the package works without Horovod until something needs it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hvd_qgenx

PACKAGE = Path(hvd_qgenx.__file__).parent

#: Each room may import the rooms before it. A wing is seen from outside by its door alone, named in DOORS.
ROOMS = [
    "checks",
    "token",
    "identity",
    "gradients",
    "key",
    "layout",
    "fitting",
    "levels",
    "words",
    "codebook",
    "payload",
    "backends.backend",
    "backends.specification.rounding",
    "backends.specification.planes",
    "backends.specification.runs",
    "backends.specification.symbols",
    "backends.specification.payload",
    "backends.specification",
    "backends.compiled",
    "backends.failures",
    "backends.cuda.device",
    "backends.cuda.host",
    "backends.cuda.jobs",
    "backends.cuda.resident",
    "backends.cuda.encoding",
    "backends.cuda.decoding",
    "backends.cuda.backend",
    "backends.cuda.staging",
    "backends.cuda.nvrtc",
    "backends.cuda.driver",
    "backends.cuda",
    "backends",
    "codec",
    "adaptation",
    "drift",
    "communication",
    "transports",
    "transports.waiting",
    "transports.hosts",
    "transports.horovod",
    "transports.torch_distributed",
    "exchange.message",
    "exchange.agreement",
    "exchange.exchange",
    "exchange.plan",
    "exchange.allgather",
    "exchange.two_phase",
    "exchange.cost",
    "exchange.rehearsal",
    "exchange.measurement",
    "exchange.dense",
    "exchange.coded",
    "exchange.ahead",
    "exchange.streamed",
    "exchange.hierarchical",
    "exchange.automatic",
    "exchange",
    "rows",
    "extragradient",
    "stock",
    "uncoded",
    "calls",
    "compressor",
    "automatic",
    "compression",
    "probe",
    "probe.__main__",
    "dual",
    "games",
    "overlap",
    "connection",
    "wrapped",
    "distributed",
    "elastic",
    "ddp.backward",
    "ddp.receiver",
    "ddp.state",
    "ddp.hook",
    "ddp",
]
#: The rooms that know Horovod.
HOROVODS = {"transports.horovod", "stock", "elastic"}
#: The rooms that know torch.distributed.
TORCHS = {"transports.torch_distributed", "ddp.state", "ddp.hook"}


def _path(room: str) -> Path:
    path = PACKAGE.joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(room: str):
    """Every module that a room imports, anywhere in it."""
    for node in ast.walk(ast.parse(_path(room).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name.removeprefix("hvd_qgenx.") in ROOMS else node.module for name in names)


def test_the_list_names_every_room():
    assert sorted([*ROOMS, ""]) == sorted(map(_name, PACKAGE.rglob("*.py")))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    for module in _imports(room):
        if module.startswith("hvd_qgenx."):
            assert ROOMS.index(module.removeprefix("hvd_qgenx.")) < ROOMS.index(room), f"{room} imports {module}"


@pytest.mark.parametrize(("framework", "rooms"), [("horovod", HOROVODS), ("torch.distributed", TORCHS)])
def test_only_a_few_rooms_import_a_framework(framework, rooms):
    users = {room for room in ROOMS for module in _imports(room) if f"{module}.".startswith(f"{framework}.")}
    assert users == rooms


def test_nothing_of_horovods_arrives_through_another_room():
    """Not by `from room import hvd`, nor as any other name that stands for one of Horovod's modules or objects."""
    for room in set(ROOMS) - HOROVODS:
        module = importlib.import_module(f"hvd_qgenx.{room}")
        arrived = [name for name, value in vars(module).items() if _home(value).split(".")[0] == "horovod"]
        assert not arrived, f"{room} has {arrived}"


def _home(value) -> str:
    name = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith(("exchange", "transports"))])
def test_the_exchange_and_the_transports_meet_in_the_protocol_alone(room):
    others = {module.removeprefix("hvd_qgenx.") for module in _imports(room) if module.startswith("hvd_qgenx.")}
    if room.startswith("exchange"):
        assert not others & {"transports.horovod", "transports.torch_distributed"}
    else:
        assert others <= {"transports", "transports.hosts", "transports.waiting"}


WITHOUT_HOROVOD = """
import sys
sys.modules["horovod"] = None
import torch, hvd_qgenx, hvd_qgenx.ddp
codec = hvd_qgenx.Codec(hvd_qgenx.Levels.uniform(4))
codec.decode_mean([codec.encode(torch.ones(5), hvd_qgenx.Key(0, 0, 0))])
hvd_qgenx.ExtraAdam([torch.zeros(1, requires_grad=True)])
compression = hvd_qgenx.Compression.qgenx(bits=4)
optimizer = hvd_qgenx.ExtraSGD([torch.zeros(1, requires_grad=True)], lr=0.1)
try:
    hvd_qgenx.DistributedOptimizer(optimizer, process_group=object())
    raise SystemExit("no error")
except RuntimeError as error:
    assert "call torch.distributed.init_process_group() first" in str(error), error
for use in (lambda: hvd_qgenx.DistributedOptimizer(optimizer), lambda: compression.compress(torch.ones(3))):
    try:
        use()
        raise SystemExit("no error")
    except ImportError as error:
        assert "needs Horovod with PyTorch: pip install" in str(error), error
"""


@pytest.mark.slow
def test_the_package_works_without_horovod_and_says_how_to_get_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_HOROVOD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'utils'"):
        _ = hvd_qgenx.utils


def test_public_names_are_documented():
    for name in hvd_qgenx.__all__:
        assert getattr(hvd_qgenx, name).__doc__, name
