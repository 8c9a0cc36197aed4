"""What every run on several ranks does alike: flags, own random numbers on each rank, replicas compared, progress in
whole lines, a folder, Ctrl-C, errors in one sentence.
"""

import argparse
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launch
import numpy as np
import torch
from tqdm import tqdm


class TrainingError(RuntimeError):
    """Training cannot go on; raised on all ranks, with one sentence."""


#: Below 2**63, so that epochs can be added to it and torch still takes it for a seed.
MOST_SEED = 2**63 - 2**32


def whole(least: int, most: int = 2**31 - 1):
    def parse(text: str) -> int:
        # Twenty digits are more than any range has, and Python takes no more than 4,300 for a number.
        if not (text.isascii() and text.isdecimal() and len(text) <= 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def positive(text: str) -> float:
    return number(text, lambda value: 0 < value < math.inf, "a positive number")


def fraction(text: str) -> float:
    return number(text, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def number(text: str, allowed, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def random_stream(seed: int, rank: int, purpose: int, device: str) -> torch.Generator:
    """An own stream for every (seed, rank, purpose). The words are mixed: seed 0 of rank 1 is not seed 1 of rank 0."""
    word = np.random.SeedSequence((seed, rank, purpose)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(word))


def replica_hash(tensors: list[torch.Tensor]) -> str:
    """sha256 of the bytes of all tensors in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def check_replicas(tensors: list[torch.Tensor], iteration: int) -> None:
    """Raises TrainingError on all ranks, naming those whose tensors are not bit for bit those of rank 0."""
    hashes = launch.gather(replica_hash(tensors), name="train.replicas")
    different = [str(rank) for rank, other in enumerate(hashes) if other != hashes[0]]
    if different:
        raise TrainingError(
            f"After iteration {iteration} the parameters of rank {', '.join(different)} differ from those of rank 0."
        )


class Lines:
    """Where the progress bar writes. Under horovodrun that is a pipe which passes on whole lines only, so each state of
    the bar becomes a line; no guess of a width, one line every five seconds.
    """

    def write(self, text: str) -> None:
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int) -> tqdm:
    """Shown by rank 0 alone."""
    return tqdm(
        total=total,
        disable=launch.rank() != 0,
        mininterval=5,
        miniters=1,
        ascii=True,
        file=Lines(),
        bar_format="{percentage:3.0f}% {n}/{total} {elapsed}<{remaining} {rate_noinv_fmt} {postfix}",
    )


def open_folder(folder: Path, config: dict) -> None:
    """Rank 0 creates the folder with config.json. Raises TrainingError on all ranks if that is not possible."""
    problem = _create(folder, config) if launch.rank() == 0 else None
    if problem := launch.share(problem, name="train.folder"):
        raise TrainingError(problem)


def _create(folder: Path, config: dict) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists():
            return f"{folder} already holds a run; choose another --out."
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        return f"The folder of the run cannot be written: {error}."
    return None


def stop(signal_number, frame) -> None:
    """Ctrl-C. horovodrun passes it on to the ranks as SIGTERM; a second one must not disturb the summary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(train: Callable[[], None], script: str, *expected: type[Exception]) -> int:
    """Runs `train` between the start of the ranks and the exit code that it returns; Ctrl-C is a clean end.

    TrainingError, and what else is `expected`, ends all ranks with its one sentence.
    """
    launch.start()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        try:
            train()
        except launch.other_rank_left():
            # Another rank left. If Ctrl-C was the reason, this rank's own signal is on its way.
            time.sleep(2)
            raise
    except KeyboardInterrupt:
        return 0
    except (TrainingError, *expected) as error:
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        time.sleep(0.5)  # all ranks say it: horovodrun ends the others as soon as one has left
        return 1
    return 0
