"""What a run writes into its folder, shows on the terminal and tells TensorBoard and Weights & Biases: rank 0 alone.

config.json      every setting, and all else that is needed to repeat the run
metrics.jsonl    a line for each logged iteration
scores.jsonl     a line for each FID and KID
samples_*.png    and, at the end, curves.png, time.png, summary.json
checkpoint-*.pt  the last two, see checkpoint.py
"""

import contextlib
import fcntl
import json
import time
from pathlib import Path

import world
from job import TrainingError, progress_bar

METRICS, SCORES = "metrics.jsonl", "scores.jsonl"
#: Settings of runs that began before there was a choice.
EARLIER = {"model": "resnet", "lookahead": 0}


def settings_of(folder: Path) -> dict:
    """What a run's config.json says. Raises OSError or json.JSONDecodeError where that cannot be read."""
    return {**EARLIER, **json.loads((folder / "config.json").read_text())}


def claim(folder: Path, config: dict | None) -> object:
    """Rank 0 makes the folder of a new run (with its config.json), or with None takes up one that is there.

    Returns what must be kept as long as the folder is to be this job's alone.

    Raises:
        TrainingError: on all ranks, if the folder holds another run, is in use, or cannot be written.
    """
    lock, problem = _claim(folder, config) if world.rank() == 0 else (None, None)
    if problem := world.from_first(problem, "train.folder"):
        raise TrainingError(problem)
    return lock


def _claim(folder: Path, config: dict | None) -> tuple[object, str | None]:
    try:
        if config is not None:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (folder / "config.json").exists():
            return None, f"{folder} holds no run to go on with."
        lock = open(folder / "lock", "w")  # noqa: SIM115 - held until the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None, f"The run in {folder} is in use by another job."
        if config is not None:
            if (folder / "config.json").exists():
                return None, f"{folder} already holds a run; choose another --out, or go on with it by --resume."
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        return None, f"The folder of the run cannot be written: {error}."
    return lock, None


def rows(path: Path) -> list[dict]:
    """The lines of a .jsonl file; a last one that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Record:
    """On other ranks than 0 it does nothing. What cannot be written is kept as ``problem``, to be told to all ranks."""

    def __init__(self, folder: Path, config: dict, iteration: int, seconds: float):
        self.folder, self.active = folder, world.rank() == 0
        self.problem: str | None = None
        self.last: dict = {"iteration": iteration, "seconds": seconds}
        self.start, self.paused = time.monotonic() - seconds, 0.0
        self.bar = progress_bar(config["iterations"], iteration)
        self.trackers: list = []
        if self.active:
            self._forget_after(iteration)
            self.trackers = [*_tensorboard(folder), *_wandb(folder, config)]

    def _forget_after(self, iteration: int) -> None:
        """Drops lines that a run wrote after its last checkpoint: it will write them again."""
        for path in (self.folder / METRICS, self.folder / SCORES):
            if path.exists():
                kept = [json.dumps(row) + "\n" for row in rows(path) if row["iteration"] <= iteration]
                path.write_text("".join(kept))

    def seconds(self) -> float:
        """Since the run began, over all its continuations; time spent on scores is not in it."""
        return round(time.monotonic() - self.start - self.paused, 3)

    @contextlib.contextmanager
    def pause(self):
        """Time inside does not count as training."""
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start

    def row(self, row: dict) -> None:
        """A line of metrics.jsonl."""
        if not self.active:
            return
        self.last = row
        self._append(METRICS, row)
        self.bar.set_postfix_str(
            f"generator {row['loss_generator']:.2f} critic {row['loss_critic']:.2f} "
            f"{row['bits_per_coordinate']:.2f} bits/coordinate "
            f"{row['bytes_sent'] / 1e6:.1f} MB of {row['bytes_float32'] / 1e6:.1f} MB float32",
            refresh=False,
        )

    def score(self, iteration: int, scores) -> None:
        """A line of scores.jsonl, and of the terminal."""
        if self.active:
            self._append(SCORES, {**self.last, **scores._asdict(), "iteration": iteration, "seconds": self.seconds()})
            self.say(f"iteration {iteration}: {scores}")

    def scored(self, iteration: int) -> bool:
        return any(row["iteration"] == iteration for row in rows(self.folder / SCORES))

    def say(self, text: str) -> None:
        if self.active:
            self.bar.clear()
            print(text, flush=True)

    @contextlib.contextmanager
    def writing(self):
        """A full disk ends the run on all ranks, at the next chance to tell them."""
        try:
            yield
        except OSError as error:
            self.problem = self.problem or f"The run's folder {self.folder} cannot be written ({error.strerror})."

    def _append(self, name: str, row: dict) -> None:
        with self.writing(), open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.log(row)

    def finish(self, outcome: str, iteration: int, hint: str = "") -> None:
        """Writes summary.json and prints the summary as the last line.

        The file comes first: on Ctrl-C, Open MPI's mpirun no longer shows what the ranks print.
        """
        if not self.active:
            return
        self.bar.close()
        summary = {**self.last, "outcome": outcome, "iteration": iteration, "seconds": self.seconds()}
        with self.writing():
            (self.folder / "summary.json").write_text(json.dumps(summary) + "\n")
        for tracker in self.trackers:
            tracker.finish()
        speed = iteration / max(self.seconds(), 1e-9)
        sent, bits = summary.get("bytes_sent", 0), summary.get("bits_per_coordinate", 0.0)
        print(
            f"{outcome}: {iteration} iterations in {self.seconds():.1f} s ({speed:.2f} per second); "
            f"{sent:,} bytes sent, {bits:.2f} bits per coordinate; {self.folder}{hint}",
            flush=True,
        )


# ---- others who are told -----------------------------------------------------------------------------------------


def numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "iteration"}


class TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, row: dict) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["iteration"])

    def finish(self) -> None:
        self.writer.close()


def _tensorboard(folder: Path) -> list:
    """TensorBoard's files, if it is installed."""
    try:
        return [TensorBoard(folder)]
    except ImportError:
        return []


class WeightsAndBiases:
    """A run that goes on continues under the same id."""

    def __init__(self, folder: Path, config: dict):
        import wandb

        name = folder.resolve().name
        self.run = wandb.init(
            project=config["wandb"], mode=config["wandb_mode"], dir=str(folder), name=name, id=name, resume="allow",
            config=config,
        )  # fmt: skip

    def log(self, row: dict) -> None:
        self.run.log(numbers(row), step=row["iteration"])

    def finish(self) -> None:
        self.run.finish()


def _wandb(folder: Path, config: dict) -> list:
    return [WeightsAndBiases(folder, config)] if config.get("wandb") else []


def check_wandb(wanted: str | None) -> None:
    """Raises TrainingError if it was asked for and is not installed."""
    try:
        if wanted:
            import wandb  # noqa: F401
    except ImportError:
        raise TrainingError("--wandb needs Weights & Biases: pip install wandb.") from None
