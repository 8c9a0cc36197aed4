"""A search around the settings of train/wgan.py's quick preset.

    python benchmarks/quick_search.py            # 12 runs of 3.5 minutes and a score each: about an hour
    python benchmarks/quick_search.py --table    # prints what benchmarks/results/quick_search.csv says

Every point of GRID is trained as the preset is, on 3 ranks for 3.5 minutes, and its last checkpoint scored: KID of 500
samples against 1,000 training images. All points with one seed first, then the best two with two more; the mean
KID over three seeds decides, if the generator's loss stayed within 50. Rows are kept as they come: the same command
goes on where it was cut off. The size of the networks is part of the grid, since it decides how many iterations there
are in the time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from laboratory import horovodrun
from records import ROOT, append, provenance

RESULTS = ROOT / "benchmarks" / "results" / "quick_search.csv"
#: One setting after the other is moved away from the first point.
FIRST = {
    "model": "dcgan",
    "optimizer": "extra_adam",
    "lr_generator": "2e-4",
    "lr_critic": "2e-3",
    "width": "24",
    "batch": "48",
    "average": "0.97",
    "beta1": "0.5",
    "lookahead": "0",
}
MOVES = [
    {},
    {"model": "resnet", "width": "16", "batch": "24", "lr_critic": "1e-3", "beta1": "0"},  # an earlier preset
    {"lr_generator": "5e-4"},
    {"lr_generator": "1e-3", "lr_critic": "1e-3"},
    {"beta1": "0"},
    {"batch": "24"},
    {"lookahead": "5"},
    {"optimizer": "past_extra_adam"},
]
GRID = [{**FIRST, **move} for move in MOVES]
COLUMNS = [
    *FIRST, "seed", "minutes", "iterations", "kid", "kid_error", "fid", "samples", "reference",
    "largest_generator_loss", "commit", "date", "device",
]  # fmt: skip
BEST, MORE_SEEDS = 2, (1, 2)
STABLE = 50.0  # the generator's loss, whose offset means nothing, stays below it where training is calm


def run_point(point: dict, seed: int, flags: argparse.Namespace) -> dict:
    """Trains and scores; a row of the CSV."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [word for name, value in point.items() for word in (f"--{name.replace('_', '-')}", value)]
        words += ["--seed", str(seed), "--minutes", str(flags.minutes), "--iterations", str(flags.iterations)]
        start = [horovodrun(), "--gloo", "-np", "3", sys.executable]
        subprocess.run(
            [*start, str(ROOT / "train" / "wgan.py"), *words, "--out", str(out), "--data", flags.data],
            env=env,
            check=True,
        )
        counts = ["--samples", str(flags.samples), "--reference", str(flags.reference), "--keep"]
        subprocess.run([*start, str(ROOT / "train" / "score.py"), str(out), *counts], env=env, check=True)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        score = json.loads((out / "scores.jsonl").read_text().splitlines()[-1])
    largest = max(abs(row["loss_generator"]) for row in metrics)
    found = {name: score[name] for name in ("kid", "kid_error", "fid", "samples", "reference")}
    return {
        **point, **found, **provenance(), "seed": seed, "minutes": flags.minutes, "iterations": score["iteration"],
        "largest_generator_loss": round(largest, 2),
    }  # fmt: skip


def rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def of_point(found: list[dict], point: dict) -> list[dict]:
    return [row for row in found if all(row[name] == value for name, value in point.items())]


def ranking(found: list[dict]) -> list[tuple[float, dict, list[dict]]]:
    """(mean KID, point, its rows), the best first; points whose loss ran away come last."""
    points = [(point, of_point(found, point)) for point in GRID]
    scored = [(fmean(float(row["kid"]) for row in own), point, own) for point, own in points if own]
    return sorted(scored, key=lambda each: (largest_loss(each[2]) > STABLE, each[0]))


def largest_loss(own: list[dict]) -> float:
    return max(float(row["largest_generator_loss"]) for row in own)


def search(flags: argparse.Namespace) -> None:
    for point in GRID[: flags.points]:
        _ensure(point, 0, flags)
    for _, point, _ in ranking(rows(flags.out))[:BEST]:
        for seed in MORE_SEEDS:
            _ensure(point, seed, flags)


def _ensure(point: dict, seed: int, flags: argparse.Namespace) -> None:
    if any(row["seed"] == str(seed) for row in of_point(rows(flags.out), point)):
        return
    row = run_point(point, seed, flags)
    append(flags.out, COLUMNS, [row])
    print(f"KID {row['kid']:.4f} +- {row['kid_error']:.4f} at iteration {row['iterations']}: {point}", flush=True)


def table(path: Path = RESULTS) -> str:
    lines = [
        f"| {' | '.join(FIRST)} | seeds | iterations | KID | largest generator loss |",
        "|" + "---|" * (len(FIRST) + 4),
    ]
    for kid, point, own in ranking(rows(path)):
        iterations = fmean(float(row["iterations"]) for row in own)
        values = [*point.values(), str(len(own)), f"{iterations:.0f}", f"{kid:.4f}", f"{largest_loss(own):.0f}"]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", action="store_true", help="print the committed rows")
    add("--minutes", type=float, default=3.5)
    add("--iterations", type=int, default=100_000, help="at most so many; the minutes end a run")
    add("--samples", type=int, default=500)
    add("--reference", type=int, default=1000)
    add("--points", type=int, default=len(GRID), help="the first so many of the grid")
    add("--data", default="auto", help="as train/wgan.py takes it")
    add("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    if not flags.table:
        search(flags)
    print(table(flags.out))


if __name__ == "__main__":
    main()
