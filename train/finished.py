"""A run that is on the disk: its settings, and the generator of one of its checkpoints. Needs no other rank."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import checkpoint
from networks import make_generator
from record import settings_of
from torch import nn


class Run(NamedTuple):
    folder: Path
    config: dict
    iteration: int
    generator: nn.Module


def open_run(folder: Path, file: Path | None = None, device: str = "cpu") -> Run:
    """The moving-average generator of the last checkpoint that can be read, or of `file`.

    Raises:
        CheckpointError: with one sentence.
    """
    try:
        config = settings_of(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise checkpoint.CheckpointError(f"{folder} holds no run ({error}).") from None
    content, warnings = (checkpoint.load(file), []) if file else checkpoint.load_last(folder)
    for warning in warnings:
        print(f"Warning: {warning} The one before it is used.", file=sys.stderr)
    generator = make_generator(config["model"], config["width"], config["latent"]).to(device).eval()
    generator.load_state_dict(content["average"])
    return Run(folder, config, content["iteration"], generator.requires_grad_(False))
