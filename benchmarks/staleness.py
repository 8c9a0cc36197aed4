"""How levels age: variance and bits as a function of the iterations since the last fit, on a WGAN-GP's own gradients.

    python benchmarks/staleness.py              # trains, writes benchmarks/results/staleness.csv and staleness.png
    python benchmarks/staleness.py --table      # draws the plot of the rows that are there, and prints their table

One process trains the networks of train/ by extra-gradient, without rounding. Levels are fitted to its gradient at
some iterations, always as ``Compression.qgenx`` does, and kept; whenever one of them has the age of interest, the
gradient of that moment tells the variance and the bits that they would give, in expectation. Levels fitted to the same
gradient, and uniform and exponential levels with the code that they have in ``Compression.qgenx``, stand beside them.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from records import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "staleness.csv"
COLUMNS = ["commit", "date", "device", "images", "width", "batch", "coordinates", "bits", "levels", "fitted_at",
           "iteration", "age", "relative_variance", "bits_per_coordinate"]  # fmt: skip
BITS = (3, 4, 8)
FITTED_AT = (0, 10, 50, 200, 1000)
AGES = (0, 1, 3, 10, 30, 100, 300, 1000, 2000)


def train(width: int, batch: int, iterations: int, images):
    """Extra-gradient on one process; yields the iteration and the gradient at its start, as a list of tensors."""
    from models import Critic, Generator, critic_loss, generator_loss

    import hvd_qgenx

    torch.manual_seed(0)
    generator, critic = Generator(width, 64), Critic(width)
    parameters = [*generator.parameters(), *critic.parameters()]
    # The learning rates that the trainer's "quick" preset had when the rows were measured.
    groups = [{"params": generator.parameters(), "lr": 3e-4}, {"params": critic.parameters(), "lr": 2e-3}]
    optimizer = hvd_qgenx.ExtraAdam(groups, betas=(0.5, 0.9))
    random = torch.Generator().manual_seed(1)

    def gradients():
        real = images[torch.randint(len(images), (batch,), generator=random)].float().div(127.5).sub(1)
        fake = generator(torch.randn(batch, 64, generator=random))
        optimizer.zero_grad()
        mixing = torch.rand(batch, 1, 1, 1, generator=random)
        critic_loss(critic, real, fake, mixing, 10.0).backward(inputs=list(critic.parameters()))
        generator_loss(critic, fake).backward(inputs=list(generator.parameters()))

    for iteration in range(iterations + 1):
        gradients()
        yield iteration, [p.grad for p in parameters]
        optimizer.extrapolation()
        gradients()
        optimizer.step()


class Snapshot:
    """One gradient: its statistics, and what levels would make of it."""

    def __init__(self, tensors: list[torch.Tensor]):
        from hvd_qgenx import Key
        from hvd_qgenx.adaptation import Settings, Statistics
        from hvd_qgenx.backends.specification import quantize
        from hvd_qgenx.backends.specification.rounding import Buckets

        vector, codec = torch.cat([t.reshape(-1) for t in tensors]), Settings().codec()
        layout = codec.layout([t.numel() for t in tensors])
        self.statistics = Statistics.measure(codec, vector.split(list(layout.sizes)), layout)
        drawn = quantize(codec.codebook, codec.norm, layout, Key(0, 0, 0), vector)
        bucket_of = Buckets.cut(layout).bucket_of
        coded = torch.cat([t.reshape(-1) for t in tensors if t.numel() >= codec.min_numel])
        self.vector, norms = coded.double().abs(), drawn.norms.double()
        self.u = (self.vector / norms.clamp(min=1e-300)[bucket_of]).clamp(max=1.0)
        self.squares = norms.square()[bucket_of]

    def fit(self, bits: int):
        from hvd_qgenx.adaptation import Settings, fit

        return Settings(bits=bits).codec(*fit(self.statistics, bits))

    def expect(self, codec) -> tuple[float, float]:
        """Relative variance, exactly, and bits per coordinate with norms and lengths, in expectation."""
        table = torch.tensor(codec.levels.values, dtype=torch.float64)
        lower = (torch.searchsorted(table, self.u, right=True) - 1).clamp(max=codec.levels.num_levels - 1)
        low, high = table[lower], table[lower + 1]
        variance = float((self.squares * (high - self.u) * (self.u - low)).sum() / self.vector.square().sum())
        up = (self.u - low) / (high - low)
        shares = torch.zeros(len(table), dtype=torch.float64)
        shares.index_add_(0, lower, 1.0 - up).index_add_(0, lower + 1, up)
        return variance, codec.expected_bits(len(self.u), (shares / len(self.u)).tolist()) / len(self.u)


def measure(width: int, batch: int, iterations: int, images):
    """Yields the rows of the plot, as training goes on."""
    from hvd_qgenx.adaptation import Settings

    kept = {}
    wanted = {start + age for start in FITTED_AT for age in AGES}
    for iteration, tensors in train(width, batch, iterations, images):
        if iteration % 100 == 0:
            print(f"iteration {iteration} of {iterations}", flush=True)
        if iteration not in wanted:
            continue
        snapshot = Snapshot(tensors)
        fresh = {bits: snapshot.fit(bits) for bits in BITS}
        if iteration in FITTED_AT:
            kept[iteration] = fresh
        for bits in BITS:
            codecs = {("adaptive", start): codecs[bits] for start, codecs in kept.items() if iteration - start in AGES}
            codecs[("fresh", iteration)] = fresh[bits]
            for name in ("uniform", "exponential"):
                codecs[(name, "")] = Settings(bits=bits, levels=name).codec()
            for (name, start), codec in codecs.items():
                variance, length = snapshot.expect(codec)
                yield {"width": width, "batch": batch, "coordinates": sum(t.numel() for t in tensors),
                       "bits": bits, "levels": name, "fitted_at": start, "iteration": iteration,
                       "age": "" if start == "" else iteration - start, "relative_variance": f"{variance:.6g}",
                       "bits_per_coordinate": f"{length:.4f}"}  # fmt: skip


def plot() -> None:
    """Adaptive levels over those fitted to the same gradient, by age; and all kinds against the iteration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(3, len(BITS), figsize=(13, 11), layout="constrained")
    for column, bits in enumerate(BITS):
        here = [row for row in rows if int(row["bits"]) == bits]
        fresh = {row["iteration"]: row for row in here if row["levels"] == "fresh"}
        _plot_ages(axes[:2, column], [row for row in here if row["levels"] == "adaptive"], fresh)
        _plot_kinds(axes[2, column], here)
        axes[0, column].set_title(f"{bits} bits")
    axes[0, 0].set_ylabel("variance / that of levels fitted now")
    axes[1, 0].set_ylabel("bits per coordinate - those of levels fitted now")
    axes[2, 0].set_ylabel("relative variance")
    axes[0, 0].legend(title="fitted at iteration")
    axes[2, 0].legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


def table() -> str:
    """Markdown: variance over that of levels fitted to the same gradient, median and worst; bits more than those."""
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    spans = [(1, 10), (30, 300), (1000, 2000)]
    lines = [
        f"| bits | {' | '.join(f'{low} to {high} iterations old' for low, high in spans)} | exponential | uniform |",
        f"|{'---|' * (len(spans) + 3)}",
    ]
    for bits in map(str, BITS):
        here = [row for row in rows if row["bits"] == bits]
        fresh = {row["iteration"]: row for row in here if row["levels"] == "fresh"}
        aged = [row for row in here if row["levels"] == "adaptive"]
        groups = [[row for row in aged if low <= int(row["age"]) <= high] for low, high in spans]
        groups += [[row for row in here if row["levels"] == name] for name in ("exponential", "uniform")]
        lines.append(f"| {bits} | {' | '.join(_cell(group, fresh) for group in groups)} |")
    return "\n".join(lines)


def _cell(rows: list[dict], fresh: dict) -> str:
    pairs = [(row, fresh[row["iteration"]]) for row in rows]
    ratios = [float(row["relative_variance"]) / float(now["relative_variance"]) for row, now in pairs]
    more = [float(row["bits_per_coordinate"]) - float(now["bits_per_coordinate"]) for row, now in pairs]
    return f"{statistics.median(ratios):.3g} (at worst {max(ratios):.3g}), {statistics.median(more):+.2f} bits"


def _plot_ages(axes, rows: list[dict], fresh: dict) -> None:
    for start in FITTED_AT:
        line = [row for row in rows if row["fitted_at"] == str(start) and int(row["age"]) > 0]
        ages = [int(row["age"]) for row in line]
        ratio = [float(row["relative_variance"]) / float(fresh[row["iteration"]]["relative_variance"]) for row in line]
        more = [float(r["bits_per_coordinate"]) - float(fresh[r["iteration"]]["bits_per_coordinate"]) for r in line]
        axes[0].plot(ages, ratio, marker=".", label=str(start))
        axes[1].plot(ages, more, marker=".")
    axes[0].set_yscale("log")
    for panel in axes:
        panel.set_xscale("log")
        panel.set_xlabel("iterations since the fit")
        panel.grid(alpha=0.3)


def _plot_kinds(panel, rows: list[dict]) -> None:
    for kind in ("fresh", "uniform", "exponential"):
        line = [row for row in rows if row["levels"] == kind]
        panel.plot([int(row["iteration"]) + 1 for row in line], [float(row["relative_variance"]) for row in line],
                   label="adaptive, fitted now" if kind == "fresh" else kind)  # fmt: skip
    last = [row for row in rows if row["levels"] == "adaptive" and row["fitted_at"] == "0" and int(row["age"]) > 0]
    panel.plot([int(row["iteration"]) + 1 for row in last], [float(row["relative_variance"]) for row in last],
               label="adaptive, fitted at iteration 0")  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel="iteration + 1")
    panel.grid(alpha=0.3)


def run(width: int, batch: int, iterations: int) -> None:
    sys.path.insert(0, str(ROOT / "train"))
    import horovod.torch as hvd
    from data import load_images

    hvd.init()
    torch.set_num_threads(1)
    array, origin = load_images("auto")
    origin = {**provenance(), "images": origin}
    start = time.monotonic()
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in measure(width, batch, iterations, torch.tensor(array[:20000])):
            writer.writerow({**origin, **row})
            file.flush()
    plot()
    print(f"{math.ceil(time.monotonic() - start)} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="draw the plot of what is there and print its table")
    parser.add_argument("--width", type=int, default=16, help="channels of both networks")
    parser.add_argument("--batch", type=int, default=8, help="images per half-step")
    parser.add_argument("--iterations", type=int, default=3000)
    flags = parser.parse_args()
    if flags.table:
        plot()
    else:
        run(flags.width, flags.batch, flags.iterations)
    print(table())
