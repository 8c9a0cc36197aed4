"""Runs a file as a script, also where torchvision, which Lightning imports, was built for another torch."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "train"))
from data import name_operators  # noqa: E402 - only from a checkout

name_operators()
del sys.argv[0], sys.path[0]
runpy.run_path(sys.argv[0], run_name="__main__")
