"""Figure 1 of the paper for any runs: FID and KID against iterations, time and bytes; where the time went; a table.

    python train/compare.py runs/* --out figure              # figure.png, figure_brief.png, figure.md, figure.csv

Reads the runs' files only. Runs that differ in nothing but their seed are one curve: the mean over seeds, and a band
from the lowest to the highest. Time is that of training, without scores.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from pictures import COLORS
from record import METRICS, SCORES, rows, settings_of

AXES = {
    "iteration": ("iterations", 1.0),
    "seconds": ("seconds of training", 1.0),
    "bytes_sent": ("MB of one rank into collectives", 1e-6),
}
SCORE_NAMES = {"fid": "FID", "kid": "KID"}
#: Settings that do not make another experiment.
FREE = {"seed", "out", "resume", "config", "device", "wandb", "wandb_mode", "trace", "profile", "check_replicas",
        "checkpoint_every", "sample_every", "log_every", "versions", "images", "threads", "threads_per_rank",
        "preset"}  # fmt: skip
ORDER = ("none", "fp16", "fixed8", "fixed4", "qgenx")
COLUMNS = {
    "label": str, "seed": int, "iteration": int, "seconds": float, "bytes_sent": int, "bits_per_coordinate": float,
    "fid": float, "kid": float, "kid_error": float, "samples": int, "reference": int,
}  # fmt: skip


class RunError(ValueError):
    """A folder that cannot be compared; one sentence."""


class Run(NamedTuple):
    config: dict
    metrics: list[dict]
    scores: list[dict]


class Group(NamedTuple):
    """Runs of one experiment, one for each seed."""

    label: str
    runs: list[Run]

    def last(self, read: Callable[[Run], float]) -> list[float]:
        return [read(run) for run in self.runs]


def read_run(folder: Path) -> Run:
    try:
        config = settings_of(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{folder} holds no run ({error})") from None
    metrics = rows(folder / METRICS)
    if not metrics:
        raise RunError(f"{folder} has no line in {METRICS} yet")
    scores = [row for row in rows(folder / SCORES) if "bytes_sent" in row]
    return Run(config, metrics, scores)


def grouped(runs: list[Run]) -> list[Group]:
    """By all settings but the seed; labelled by those in which the groups differ, the compression first."""
    keys = [{name: json.dumps(value) for name, value in run.config.items() if name not in FREE} for run in runs]
    names = sorted({name for key in keys for name in key})
    differ = [name for name in names if len({key.get(name) for key in keys}) > 1 and name != "compression"]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = [f"{name} {run.config.get(name)}" for name in differ]
        groups.setdefault(", ".join([run.config["compression"], *rest]), []).append(run)
    return [Group(label, groups[label]) for label in sorted(groups, key=_place)]


def _place(label: str) -> tuple:
    name = label.split(",")[0].split(":")[0]
    return ORDER.index(name) if name in ORDER else len(ORDER), label


# ---- the table ---------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    """The mean, and the lowest and highest where there are several that differ."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    mean, lowest, highest = (f"{value:.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def final(run: Run, name: str) -> float:
    return run.scores[-1][name] if run.scores else math.nan


def seconds_to(group: Group, kid: float) -> float:
    """Training seconds until KID, the mean over seeds, is first at most this, on the line between two scores.

    Both are means over seeds, so that one that never comes so far is not left out.
    """
    before: tuple[float, float] | None = None
    for seconds, mean, *_ in mean_curve(group, "kid", "seconds"):
        if mean <= kid:
            if before is None:
                return seconds
            part = (before[1] - kid) / (before[1] - mean)
            return before[0] + part * (seconds - before[0])
        before = seconds, mean
    return math.nan


def goal_of(groups: list[Group]) -> float:
    """The highest of float32's last KIDs: a run that is below has come to where float32's own seeds end.

    NaN without such runs.
    """
    dense = next((group.runs for group in groups if group.label == "none"), [])
    return max((final(run, "kid") for run in dense), default=math.nan)


def table(groups: list[Group]) -> str:
    goal = goal_of(groups)
    lines = [
        "| compression | seeds | iterations | FID | KID | MB into collectives | bits per coordinate | seconds "
        "| seconds to float32's KID |",
        "|" + "---|" * 9,
    ]
    for group in groups:
        # Not the last line of all, in whose time the pictures of the end are.
        last = [(run.scores or run.metrics)[-1] for run in group.runs]
        cells = [
            f"`{group.label}`",
            str(len(group.runs)),
            spread([row["iteration"] for row in last], 0),
            spread([final(run, "fid") for run in group.runs], 1),
            spread([final(run, "kid") for run in group.runs], 4),
            spread([row["bytes_sent"] / 1e6 for row in last], 1),
            spread([row["bits_per_coordinate"] for row in last], 2),
            spread([row["seconds"] for row in last], 0),
            spread([seconds_to(group, goal)], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(groups)])


def brief_table(groups: list[Group]) -> str:
    """Of ``table``, what a first page shows."""
    goal = goal_of(groups)
    lines = [
        "| compression | KID | MB into collectives | seconds | seconds to float32's KID |",
        "|" + "---|" * 5,
    ]
    for group in groups:
        cells = [
            f"`{group.label}`",
            spread([final(run, "kid") for run in group.runs], 3),
            f"{fmean(run.scores[-1]['bytes_sent'] for run in group.runs) / 1e6:.0f}",
            f"{fmean(run.scores[-1]['seconds'] for run in group.runs):.0f}",
            spread([seconds_to(group, goal)], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _notes(groups: list[Group]) -> list[str]:
    counts = {(row["samples"], row["reference"]) for group in groups for run in group.runs for row in run.scores}
    notes = [
        f"FID and KID of {samples} samples against {reference} training images."
        for samples, reference in sorted(counts)
    ]
    notes.append("MB into collectives: what a rank hands over; an allgather sends it to every other rank.")
    if not math.isnan(goal_of(groups)):
        notes.append(
            "The last column: until KID, the mean over seeds, is first at most the highest that float32 ends in; "
            "- is never."
        )
    if len(counts) > 1:
        notes.append("FIDs of different numbers of images must not be compared.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Means over seeds; in brackets the lowest and the highest.")
    return notes


def write_csv(groups: list[Group], path: Path) -> None:
    """A line for each score."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
        writer.writeheader()
        for group in groups:
            for run in group.runs:
                writer.writerows({"label": group.label, "seed": run.config["seed"], **row} for row in run.scores)


def read_csv(path: Path) -> list[Group]:
    """The groups of a file that ``write_csv`` wrote, as far as tables need them."""
    found: dict[str, dict[int, list[dict]]] = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            row = {name: kind(line[name]) for name, kind in COLUMNS.items()}
            found.setdefault(row["label"], {}).setdefault(row["seed"], []).append(row)
    return [
        Group(label, [Run({"seed": seed}, scores[-1:], scores) for seed, scores in seeds.items()])
        for label, seeds in found.items()
    ]


# ---- the figure --------------------------------------------------------------------------------------------------


def draw(groups: list[Group], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(17, 7.5), layout="constrained")
    for line, (score, title) in enumerate(SCORE_NAMES.items()):
        for place, (axis, (label, unit)) in enumerate(AXES.items()):
            _curves(axes[line][place], groups, score, axis, unit)
            axes[line][place].set(xlabel=label, ylabel=title)
    axes[0][1].set_xscale("log")
    axes[1][1].set_xscale("log")
    axes[0][2].set_xscale("log")
    axes[1][2].set_xscale("log")
    axes[0][0].legend(fontsize=8)
    _bars(axes[0][3], groups)
    _sent(axes[1][3], groups)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_brief(groups: list[Group], path: Path) -> None:
    """KID against bytes and against time: the picture for a first page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for place, axis in zip(axes, ("bytes_sent", "seconds"), strict=True):
        label, unit = AXES[axis]
        _curves(place, groups, "kid", axis, unit)
        place.set(xlabel=label, xscale="log")
        place.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KID (lower is better)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(axes, groups: list[Group], score: str, axis: str, unit: float) -> None:
    for number, group in enumerate(groups):
        points = mean_curve(group, score, axis)
        if not points:
            continue
        x = [unit * point[0] for point in points]
        color = f"C{number}"
        axes.plot(x, [point[1] for point in points], marker="o", markersize=3, color=color, label=group.label)
        axes.fill_between(x, [point[2] for point in points], [point[3] for point in points], color=color, alpha=0.15)


def mean_curve(group: Group, score: str, axis: str) -> list[tuple[float, float, float, float]]:
    """(mean of the axis, mean, lowest and highest score) at the iterations that all seeds have been scored at."""
    by_iteration = [{row["iteration"]: row for row in run.scores} for run in group.runs]
    shared = sorted(set.intersection(*map(set, by_iteration))) if by_iteration else []
    points = []
    for iteration in shared:
        here = [each[iteration] for each in by_iteration]
        values = [row[score] for row in here]
        points.append((fmean(row[axis] for row in here), fmean(values), min(values), max(values)))
    return points


def _bars(axes, groups: list[Group]) -> None:
    """Milliseconds of an iteration by part, the mean over the logged lines."""
    left = [0.0] * len(groups)
    for part, color in COLORS.items():
        widths = [fmean(max(row.get(f"ms_{part}", 0.0), 0.0) for run in g.runs for row in run.metrics) for g in groups]
        axes.barh([g.label for g in groups], widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of an iteration, rank 0")
    axes.legend(fontsize=7, ncols=2)


def _sent(axes, groups: list[Group]) -> None:
    bits = [fmean(run.metrics[-1]["bits_per_coordinate"] for run in group.runs) for group in groups]
    bars = axes.barh([group.label for group in groups], bits, color="#1b6ca8")
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bits per coordinate")


def compare(folders: list[Path], out: Path) -> str:
    """Writes OUT.png, OUT_brief.png, OUT.md and OUT.csv; returns the table."""
    groups = grouped([read_run(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    text = table(groups)
    out.with_suffix(".md").write_text(text + "\n")
    write_csv(groups, out.with_suffix(".csv"))
    draw(groups, out.with_suffix(".png"))
    draw_brief(groups, out.with_name(f"{out.name}_brief.png"))
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of train/wgan.py")
    parser.add_argument(
        "--out", type=Path, default=Path("figure"), help="name of the files, without an ending (figure)"
    )
    flags = parser.parse_args(arguments)
    try:
        print(compare(flags.runs, flags.out))
    except RunError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
