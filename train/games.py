"""Q-GenX on games whose solution is known: how fast the error falls, in iterations and in bytes.

    horovodrun -np 4 python train/games.py --game bilinear
    horovodrun -np 4 python train/games.py --game bilinear --noise absolute --compression none
    horovodrun -np 4 python train/games.py --game bilinear --method sgd         # plain descent-ascent diverges
    horovodrun -np 4 python train/games.py --game matrix --method optimistic    # one exchange per iteration

Every rank asks an oracle for A(x) plus noise of its own. The error is the restricted gap of the average of the points
x_{t+1/2} at which the second gradient was asked for, computed exactly (train/problems.py says how). All ranks must end
with bit-identical parameters and step sizes.

A run's folder holds config.json, metrics.jsonl (one object for each power of two of iterations), gap.png and
summary.json. Ctrl-C ends all ranks and counts as a clean end.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launch
import numpy as np
import torch
from job import MOST_SEED, check_replicas, open_folder, positive, progress_bar, random_stream, run, whole
from pictures import save_gap
from problems import BLOCK, NOISES, PROBLEMS, add_noise, make
from torch import Tensor

import hvd_qgenx

METHODS = {
    "dual_averaging": lambda x, scale: hvd_qgenx.QGenX(x, "dual_averaging", scale),
    "dual_extrapolation": lambda x, scale: hvd_qgenx.QGenX(x, "dual_extrapolation", scale),
    "optimistic": lambda x, scale: hvd_qgenx.QGenX(x, "optimistic", scale),
    "extra_sgd": lambda x, scale: hvd_qgenx.ExtraSGD(x, lr=scale),
    "past_sgd": lambda x, scale: hvd_qgenx.ExtraSGD(x, lr=scale, past=True),
    "sgd": lambda x, scale: torch.optim.SGD(x, lr=scale),
}
# min_numel=0: small parameters would travel as float32, and a game is small.
COMPRESSIONS = {
    "none": lambda seed: hvd_qgenx.Compression.none,
    "fp16": lambda seed: hvd_qgenx.Compression.fp16,
    "bits8": lambda seed: hvd_qgenx.Compression.qgenx(bits=8, min_numel=0, seed=seed),
    "bits4": lambda seed: hvd_qgenx.Compression.qgenx(bits=4, min_numel=0, seed=seed),
    "bits3": lambda seed: hvd_qgenx.Compression.qgenx(bits=3, min_numel=0, seed=seed),
    "ternary": lambda seed: hvd_qgenx.Compression.qgenx(bits=2, norm="linf", min_numel=0, seed=seed),
}
DIVERGED = 1e6  # a point this much farther from the start than the solution is


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="games.py [--flag value ...]; --help lists the flags",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--game", choices=PROBLEMS, default="bilinear")
    add(
        "--dimension",
        type=whole(2, 2**24),
        default=20,
        help=f"even, beyond {BLOCK} a multiple of it; not for logistic (20)",
    )
    add("--noise", choices=NOISES, default="relative", help="of each rank's oracle (relative)")
    add("--noise-size", type=positive, help="its root mean square, against ||A|| if relative (0.5, absolute 1)")
    add("--method", choices=METHODS, default="dual_extrapolation")
    add("--scale", type=positive, help="step_scale of Q-GenX (1), or the learning rate (0.3)")
    add("--compression", choices=COMPRESSIONS, default="bits4", help="what travels between the ranks (bits4)")
    add("--iterations", type=whole(1), default=2048)
    add("--seed", type=whole(0, MOST_SEED), default=0, help="of the game, of the ranks' noise and of rounding (0)")
    add("--out", type=Path, help="folder of the run (runs/<time>-<game>)")
    flags = parser.parse_args(arguments)
    flags.noise_size = flags.noise_size or (0.5 if flags.noise == "relative" else 1.0)
    flags.scale = flags.scale or (0.3 if flags.method.endswith("sgd") else 1.0)
    try:
        make(flags.game, flags.dimension)
    except (ValueError, ImportError) as error:
        parser.error(f"--game {flags.game} --dimension {flags.dimension}: {error}")
    return flags


def wrap(flags: argparse.Namespace, x: torch.nn.Parameter) -> hvd_qgenx.DistributedOptimizer:
    rule = METHODS[flags.method]([x], flags.scale)
    compression = COMPRESSIONS[flags.compression](flags.seed)
    return hvd_qgenx.DistributedOptimizer(rule, [("x", x)], compression=compression, **launch.optimizer_options())


def play(problem, x: torch.nn.Parameter, opt, oracle: Callable[[Tensor], Tensor], iterations: int) -> Iterator:
    """Yields (t, the average of x_{3/2}, ..., x_{t+1/2}) after each iteration; of x_1, ..., x_t for a plain method."""
    average = torch.zeros_like(problem.start)
    extrapolates = hasattr(opt.optimizer, "extrapolation")
    project = torch.no_grad()(lambda: x.copy_(problem.project(x.double())))
    for t in range(1, iterations + 1):
        if extrapolates:
            if opt.optimizer.extrapolation_uses_gradient:
                x.grad = oracle(x)
            opt.extrapolation()
            project()
        x.grad = oracle(x)
        average.lerp_(x.detach().double(), 1 / t)
        opt.step()
        project()
        yield t, average


def train(flags: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    problem = make(flags.game, flags.dimension, seed=flags.seed)
    x = torch.nn.Parameter(problem.start.float())
    opt = wrap(flags, x)
    launch.copy_from_first({"x": x}, opt)
    random = random_stream(flags.seed, launch.rank(), 0, "cpu")

    def oracle(x: Tensor) -> Tensor:
        return add_noise(problem.operator(x.detach().double()), flags.noise, flags.noise_size, random).float()

    folder = flags.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{flags.game}"
    open_folder(folder, {**vars(flags), "out": str(folder), "world_size": launch.size(), "coordinates": x.numel()})
    start, bar, rows, outcome = time.monotonic(), progress_bar(flags.iterations), [], "Finished"
    limit = DIVERGED * max(1.0, float(problem.start.norm()))
    try:
        for t, average in play(problem, x, opt, oracle, flags.iterations):
            bar.update()
            diverged = not float(x.detach().norm()) < limit  # the same number on all ranks
            if t & (t - 1) == 0 or t == flags.iterations or diverged:
                rows.append(measure(problem, t, x, average, opt))
                write_row(folder, bar, rows[-1])
            if diverged:
                outcome = "Diverged"
                break
    except KeyboardInterrupt:
        finish(folder, bar, "Stopped", rows, time.monotonic() - start, opt)
        raise
    check_replicas([x, torch.tensor(getattr(opt.optimizer, "gamma", 0.0), dtype=torch.float64)], t)
    outcome += ", parameters and step sizes bit-identical on all ranks"
    finish(folder, bar, outcome, rows, time.monotonic() - start, opt)


def measure(problem, t: int, x: Tensor, average: Tensor, opt) -> dict:
    sent = opt.communication
    return {
        "iteration": t,
        "gap": float(problem.gap(average)),
        "gap_of_last": float(problem.gap(x.detach().double())),
        "gamma": getattr(opt.optimizer, "gamma", None),
        "exchanges": sent.exchanges,
        "bytes_sent": sent.bytes_sent,
    }


def write_row(folder: Path, bar, row: dict) -> None:
    if launch.rank() == 0:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        bar.set_postfix_str(
            f"gap {row['gap']:.2e} after {row['iteration']}, {row['bytes_sent']:,} bytes sent", refresh=False
        )


def slope(iterations: list[int], gaps: list[float], octaves: int = 5) -> float | None:
    """Of log gap over log iterations, fitted to the last `octaves` + 1 powers of two; None if there are not so many."""
    points = [
        (math.log(t), math.log(gap))
        for t, gap in zip(iterations, gaps, strict=True)
        if t & (t - 1) == 0 and 0 < gap < math.inf
    ][-octaves - 1 :]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > octaves else None


def finish(folder: Path, bar, outcome: str, rows: list[dict], seconds: float, opt) -> None:
    """Writes summary.json and the picture, then prints the summary as the last line."""
    if launch.rank() != 0:
        return
    bar.close()
    last = rows[-1] if rows else {"iteration": 0, "gap": math.nan}
    fall = slope([row["iteration"] for row in rows], [row["gap"] for row in rows])
    summary = {**last, "outcome": outcome, "seconds": round(seconds, 3), "slope": fall}
    (folder / "summary.json").write_text(json.dumps(summary) + "\n")
    if len(rows) > 1:
        save_gap(folder)
    falling = "" if fall is None else f", falling as T^{fall:.2f} over the last 5 octaves"
    print(
        f"{outcome}: {last['iteration']} iterations in {seconds:.1f} s; gap {last['gap']:.3g}{falling}; "
        f"{opt.communication}; {folder}",
        flush=True,
    )


if __name__ == "__main__":
    flags = parse_flags()
    sys.exit(run(lambda: train(flags), "games.py"))
