"""Checkpoints of a run: written whole or not at all, the last two kept, a broken last one passed over.

A file is `checkpoint-<moves>-<first 16 digits of its sha256>.pt`: its name is its check.
"""

import io
import os
import re
from hashlib import sha256
from pathlib import Path

import torch
from data import file_hash

FORMAT = "checkpoint of hvd_qgenx's train/wgan.py, version 1"
KEPT = 2
NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]{16})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; one sentence."""


def save(folder: Path, moves: int, content: dict) -> Path:
    """Writes `content` beside the older ones, then removes all but the last two.

    Raises:
        CheckpointError: if the disk does not take it; what was there is then as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "moves": moves, **content}, buffer)
    data = buffer.getbuffer()
    path = folder / f"checkpoint-{moves:010d}-{sha256(data).hexdigest()[:16]}.pt"
    partial = folder / "checkpoint.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave the name without the bytes
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"The checkpoint cannot be written to {folder} ({error.strerror}).") from None
    for old in saved(folder)[:-KEPT]:
        old.unlink()
    return path


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*.pt") if NAME.fullmatch(path.name))


def load(path: Path) -> dict:
    """Reads one file; nothing in it is executed.

    Raises:
        CheckpointError: if it is missing, damaged, or of another program.
    """
    name = NAME.fullmatch(path.name)
    try:
        if name and file_hash(path)[:16] != name[2]:
            raise CheckpointError(f"{path} is damaged: its content is not what its name says.")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    except CheckpointError:
        raise
    except Exception:  # whatever torch says of a file that it did not write
        raise CheckpointError(f"{path} is not a checkpoint that torch can read safely.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of train/wgan.py.")
    return content


def load_last(folder: Path) -> tuple[dict, list[str]]:
    """The last checkpoint that can be read, and a sentence about each later one that cannot.

    Raises:
        CheckpointError: if there is none.
    """
    problems: list[str] = []
    for path in reversed(saved(folder)):
        try:
            return load(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(" ".join([f"{folder} has no checkpoint to go on from.", *problems]))
