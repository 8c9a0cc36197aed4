"""Imports point one way, and the package works without Horovod until something needs it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hvd_qgenx

PACKAGE = Path(hvd_qgenx.__file__).parent

#: Each room may import the rooms before it.
ROOMS = [
    "checks",
    "distribution",
    "levels",
    "reference",
    "core",
    "quantize",
    "words",
    "bitplanes",
    "runs",
    "coders",
    "payload",
    "codec",
    "adaptation",
    "traffic",
    "collective",
    "exchange",
    "compression",
    "extragradient",
    "dual",
    "games",
    "distributed",
]


def _imports(path: Path):
    """(module, whether it is imported when this module is) for every import statement."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        at_once = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "hvd_qgenx":
            yield from ((f"hvd_qgenx.{alias.name}", at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, at_once


def test_the_list_names_every_room():
    assert sorted(ROOMS) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    for module, _ in _imports(PACKAGE / f"{room}.py"):
        if module.startswith("hvd_qgenx."):
            assert ROOMS.index(module.split(".")[1]) < ROOMS.index(room), f"{room} imports {module}"


def test_only_two_rooms_import_horovod():
    users = {room for room in ROOMS for module, _ in _imports(PACKAGE / f"{room}.py") if module.startswith("horovod")}
    assert users == {"collective", "distributed"}


WITHOUT_HOROVOD = """
import sys
sys.modules["horovod"] = None
import torch, hvd_qgenx
codec = hvd_qgenx.Codec(hvd_qgenx.Levels.uniform(4))
codec.decode_mean([codec.encode(torch.ones(5), hvd_qgenx.Key(0, 0, 0))])
hvd_qgenx.ExtraAdam([torch.zeros(1, requires_grad=True)])
compression = hvd_qgenx.Compression.qgenx(bits=4)
for use in (lambda: hvd_qgenx.DistributedOptimizer, lambda: compression.compress(torch.ones(3))):
    try:
        use()
        raise SystemExit("no error")
    except ImportError as error:
        assert "needs Horovod with PyTorch: pip install" in str(error), error
"""


def test_the_package_works_without_horovod_and_says_how_to_get_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_HOROVOD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'utils'"):
        _ = hvd_qgenx.utils


def test_public_names_are_documented():
    for name in hvd_qgenx.__all__:
        assert getattr(hvd_qgenx, name).__doc__, name
