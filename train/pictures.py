"""Pictures of a run: grids of images, and curves drawn from its metrics.jsonl."""

import json
from pathlib import Path

from PIL import Image
from torch import Tensor

#: Of the parts of an iteration's time: greys for the computation, colours for the exchange.
COLORS = {
    "data": "#d9d9d9",
    "forward": "#bdbdbd",
    "backward": "#8c8c8c",
    "encode": "#1b6ca8",
    "wait": "#f2a541",
    "decode": "#d1495b",
    "update": "#4f4f4f",
}


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Writes float images (rows * columns, 3, height, width) in [-1, 1] as one PNG, row by row."""
    count, channels, height, width = images.shape
    grid = images.detach().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    grid = grid.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    Image.fromarray(grid.reshape(count // columns * height, columns * width, channels).numpy()).save(path)


def save_curves(folder: Path) -> None:
    """Writes curves.png from metrics.jsonl: both losses, and the bytes sent so far against those of float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    iterations = [row["iteration"] for row in rows]
    figure, (losses, traffic) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in ("loss_critic", "loss_generator"):
        losses.plot(iterations, [row[name] for row in rows], label=name.replace("_", " "))
    for name, label in (("bytes_float32", "as float32"), ("bytes_sent", "sent")):
        traffic.plot(iterations, [row[name] / 1e6 for row in rows], label=label)
    traffic.set_ylabel("MB handed to collectives by one rank")
    for axes in (losses, traffic):
        axes.set_xlabel("iteration")
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)


def save_time(folder: Path) -> None:
    """Writes time.png from metrics.jsonl: milliseconds of an iteration, stacked by where they went."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name.startswith("ms_")]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    columns = [[max(row[name], 0.0) for row in rows] for name in names]
    labels = [name.removeprefix("ms_") for name in names]
    axes.stackplot(
        [row["iteration"] for row in rows], columns, labels=labels, colors=[COLORS[label] for label in labels]
    )
    axes.set_xlabel("iteration")
    axes.set_ylabel("ms of an iteration, rank 0")
    axes.legend(loc="upper right", ncols=4)
    figure.savefig(folder / "time.png", dpi=120)
    pyplot.close(figure)


def save_gap(folder: Path) -> None:
    """Writes gap.png from metrics.jsonl: the gap against iterations and against bytes, and the theory's slopes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, key, label in ((axes[0], "iteration", "iterations"), (axes[1], "bytes_sent", "bytes sent by one rank")):
        axis.loglog([max(row[key], 1) for row in rows], [row["gap"] for row in rows], marker="o", label="gap")
        axis.set_xlabel(label)
    first = rows[0]
    for power, style in ((-0.5, ":"), (-1.0, "--")):
        line = [first["gap"] * (row["iteration"] / first["iteration"]) ** power for row in rows]
        axes[0].loglog([row["iteration"] for row in rows], line, style, color="grey", label=f"T^{power}")
    axes[0].set_ylabel("restricted gap of the average")
    axes[0].legend()
    figure.savefig(folder / "gap.png", dpi=120)
    pyplot.close(figure)
