"""What every run under horovodrun does alike: flags, own random numbers on each rank, replicas compared, progress in
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
import world
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


def weight(text: str) -> float:
    return number(text, lambda value: 0 <= value < math.inf, "a number of at least 0")


def number(text: str, allowed, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def random_stream(seed: int, rank: int, purpose: int, device: str, *more: int) -> torch.Generator:
    """An own stream for every (seed, rank, purpose, ...). They are mixed: seed 0 of rank 1 is not seed 1 of rank 0."""
    word = np.random.SeedSequence((seed, rank, purpose, *more)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(word))


def replica_hash(tensors: list[torch.Tensor]) -> torch.Tensor:
    """sha256 of the bytes of all tensors in order: uint8 of shape (1, 32)."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return torch.tensor([list(digest.digest())], dtype=torch.uint8)


def check_replicas(tensors: list[torch.Tensor], iteration: int) -> None:
    """Raises TrainingError on all ranks, naming those whose tensors are not bit for bit those of rank 0."""
    hashes = world.gather(replica_hash(tensors), "train.replicas")
    different = [str(rank) for rank in range(len(hashes)) if not torch.equal(hashes[rank], hashes[0])]
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


def progress_bar(total: int, done: int = 0) -> tqdm:
    """Shown by rank 0 alone: in place on a terminal, which a single process may have; as lines under a launcher."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=done, disable=world.rank() != 0, dynamic_ncols=True, ascii=True)
    return tqdm(
        total=total,
        initial=done,
        disable=world.rank() != 0,
        mininterval=5,
        miniters=1,
        ascii=True,
        file=Lines(),
        bar_format="{percentage:3.0f}% {n}/{total} {elapsed}<{remaining} {rate_noinv_fmt} {postfix}",
    )


def open_folder(folder: Path, config: dict) -> None:
    """Rank 0 creates the folder with config.json. Raises TrainingError on all ranks if that is not possible."""
    problem = _create(folder, config) if world.rank() == 0 else None
    if problem := world.from_first(problem, "train.folder"):
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


class Stop:
    """A signal to stop: it is kept, and all ranks end together at the next point where nothing is under way.

    Further signals are ignored: launchers send several. What they do not survive, the last checkpoint does.
    """

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, signal_number, frame) -> None:
        self.asked = True


def run(train: Callable[[], None], script: str, *expected: type[Exception]) -> int:
    """Runs `train` between world.start() and the exit code that it returns; Ctrl-C is a clean end.

    TrainingError, and what else is `expected`, ends all ranks with its one sentence. So does a rank that left.
    """
    world.start()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        try:
            train()
            launch.end()
        except (TrainingError, *expected):
            raise
        except world.other_rank_left():
            # Another rank left. If Ctrl-C was the reason, this rank's own signal is on its way.
            time.sleep(2)
            if launch.by_torchrun():
                raise  # there any RuntimeError looks like that one, so that what it says must be seen
            print(f"{script}: another rank left the job; rank {world.rank()} ends.", file=sys.stderr, flush=True)
            return 1
    except KeyboardInterrupt:
        return 0
    except (TrainingError, *expected) as error:
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        time.sleep(0.5)  # all ranks say it: horovodrun ends the others as soon as one has left
        return 1
    return 0
