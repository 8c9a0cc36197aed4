"""Where the time of an iteration goes, and a Chrome trace of a few iterations.

Parts: data, forward (with the gradient penalty's inner backward), backward, encode, wait, decode, update. On a GPU the
work of a part may still be running when it ends; waiting for it there, as --profile does, makes the whole slower.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

PARTS = ("data", "forward", "backward", "encode", "wait", "decode", "update")
FIRST_TRACED = 3  # iterations before it fit levels and fill caches


class Clock:
    """Seconds by part since the last ``take``; ``exchanged`` is what the library has measured itself so far."""

    def __init__(self, exchanged: Callable[[], dict[str, float]], waits_for_gpu: bool):
        self.exchanged, self.waits_for_gpu = exchanged, waits_for_gpu
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.before = exchanged()

    @contextlib.contextmanager
    def __call__(self, part: str):
        start = time.perf_counter()
        with torch.profiler.record_function(f"train.{part}"):
            yield
            if self.waits_for_gpu:
                torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start

    def take(self, iterations: int) -> dict[str, float]:
        """Milliseconds of an iteration by part, as columns of metrics.jsonl."""
        now = self.exchanged()
        for phase, total in now.items():
            self.seconds[phase] = total - self.before[phase]
            self.seconds["update"] -= self.seconds[phase]  # an exchange happens inside of an update
        columns = {f"ms_{part}": round(1e3 * self.seconds[part] / iterations, 3) for part in PARTS}
        self.seconds, self.before = dict.fromkeys(PARTS, 0.0), now
        return columns


class Trace:
    """Records iterations 3 to N + 2 of this process and writes trace.json, for chrome://tracing and Perfetto."""

    def __init__(self, path: Path, iterations: int, device: str):
        self.path, self.left, self.wait = path, iterations, FIRST_TRACED - 1
        kinds = torch.profiler.ProfilerActivity
        self.kinds = [kinds.CPU, kinds.CUDA] if device == "cuda" else [kinds.CPU]
        self.running: torch.profiler.profile | None = None

    def before_iteration(self) -> None:
        if self.wait:
            self.wait -= 1
        elif self.left and self.running is None:
            self.running = torch.profiler.profile(activities=self.kinds)
            self.running.start()

    def after_iteration(self) -> None:
        if self.running is not None:
            self.left -= 1
            if self.left == 0:
                self.end()

    def end(self) -> None:
        if self.running is not None:
            self.running.stop()
            self.running.export_chrome_trace(str(self.path))
            self.running, self.left = None, 0
