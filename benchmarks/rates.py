"""The rates of Q-GenX, reproduced: the restricted gap against iterations, ranks and bytes, for every choice.

    python benchmarks/rates.py                      # everything: writes benchmarks/results/rates.csv and rates_*.png
    python benchmarks/rates.py --part slopes        # one part of PARTS; its rows replace those that are there
    python benchmarks/rates.py --table              # prints the claims, computed from rates.csv, as a Markdown table
    python benchmarks/rates.py --plot               # draws the pictures from rates.csv

Simulated ranks run in one process: every seed has its own game and noise, and all seeds are rows of one tensor.
Algorithm 1 is written out for such rows, since 8 seeds of a game of 20 coordinates would otherwise spend their time in
calls; tests/test_rates.py compares it with hvd_qgenx.QGenX. The vectors of all seeds and ranks are one payload, a
segment each. Real processes run train/games.py's loop, with hvd_qgenx.DistributedOptimizer, under horovodrun.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys

import numpy as np
import torch
from records import ROOT, provenance

import hvd_qgenx

sys.path.insert(0, str(ROOT / "train"))
import problems
from games import COMPRESSIONS, METHODS, play, slope

FOLDER = ROOT / "benchmarks" / "results"
RESULTS = FOLDER / "rates.csv"
COLUMNS = ["commit", "date", "device", "part", "ranks", "game", "dimension", "noise", "method", "choice", "seeds",
           "iteration", "gap", "standard_error", "exchanges", "bytes_sent"]  # fmt: skip
DUAL = ("dual_averaging", "dual_extrapolation", "optimistic")
SIZES = {"none": 0.0, "relative": 0.5, "absolute": 1.0}  # of the noise, see problems.add_noise
LEVELS = {"bits8": 8, "bits4": 4, "bits3": 3}  # of simulated ranks: uniform levels, L2, one bucket a vector
FIRST = 16  # the first iteration that is kept


# ---- simulated ranks -----------------------------------------------------------------------------------------------


class Simulation:
    """K ranks of every seed in one process, in float64 but for what is coded; ``method`` as in train/games.py."""

    def __init__(self, game: str, method: str, noise: str, choice: str, ranks: int, seeds: int, dimension: int = 20):
        self.problem = problems.make(game, dimension, seeds)
        self.method, self.noise, self.calls = method, noise, 0
        self.points = self.half = self.problem.start.clone()
        self.shape = (seeds, ranks, self.points.shape[1])
        self.codec = hvd_qgenx.Codec(hvd_qgenx.Levels.uniform(LEVELS[choice])) if choice in LEVELS else None
        self.random = torch.Generator().manual_seed(1)
        self.before = torch.zeros(self.shape, dtype=torch.float64)  # every rank's V_t
        self.dual = torch.zeros_like(self.points)
        self.sums = torch.zeros(seeds, 1, dtype=torch.float64)

    def received(self) -> torch.Tensor:
        """What all ranks see of every rank's oracle at the present points, (seeds, ranks, dimension)."""
        value = self.problem.operator(self.points)[:, None].expand(self.shape)
        value = problems.add_noise(value, self.noise, SIZES[self.noise], self.random)
        if self.codec is None:
            return value
        seeds, ranks, dimension = self.shape
        key, self.calls = hvd_qgenx.Key(seed=0, rank=0, step=self.calls), self.calls + 1
        payload = self.codec.encode(value, key, sizes=[dimension] * (seeds * ranks), inline=False)
        return self.codec.decode_mean([payload]).view(self.shape).double()

    @property
    def gamma(self) -> torch.Tensor:
        return self.shape[1] * (1.0 + self.sums) ** -0.5

    def iterate(self) -> None:
        """One iteration; leaves the points of the half-step, or of plain descent's gradient, in ``half``."""
        if self.method == "sgd":
            self.half, value = self.points, self.received()
            self.points = self.points - 0.3 * value.mean(1)
            return
        if self.method == "dual_extrapolation":
            self.before = self.received()
        self.points = self.half = self.problem.project(self.points - self.gamma * self.before.mean(1))
        value = self.received()
        self.sums = self.sums + (value - self.before).square().sum((1, 2))[:, None]
        self.dual = self.dual - value.mean(1)
        if self.method == "optimistic":
            self.before = value
        self.points = self.problem.project(self.problem.start + self.gamma * self.dual)

    def gaps(self, iterations: int):
        """Yields (t, gap of the average of every seed) for powers of two."""
        average = torch.zeros_like(self.points)
        for t in range(1, iterations + 1):
            self.iterate()
            average.lerp_(self.half, 1 / t)
            if t & (t - 1) == 0:
                yield t, self.problem.gap(average)


def simulate(iterations: int, seeds: int, **setting) -> list[dict]:
    """Rows of a setting: game, method, noise, choice, ranks; one for each power of two from ``FIRST``."""
    setting = {"game": "bilinear", "noise": "none", "choice": "none", "ranks": 1, **setting}
    simulation = Simulation(**setting, seeds=seeds)
    exchanges = 2 if setting["method"] == "dual_extrapolation" else 1
    rows = []
    for t, gaps in simulation.gaps(iterations):
        row = {**setting, "dimension": simulation.shape[2], "seeds": seeds, "iteration": t, "exchanges": exchanges * t}
        rows.append({**row, **spread(gaps)})
    print(f"{setting}: gap {rows[-1]['gap']}", flush=True)
    return [row for row in rows if row["iteration"] >= FIRST]


def spread(gaps: torch.Tensor) -> dict:
    error = float(gaps.std()) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return {"gap": f"{float(gaps.mean()):.5g}", "standard_error": f"{error:.3g}"}


# ---- real processes ------------------------------------------------------------------------------------------------


def real(iterations: int, seeds: int, dimension: int, method: str, noise: str, choice: str) -> list[dict]:
    """Rows of a setting on the bilinear game, on every rank of this horovodrun."""
    import horovod.torch as hvd
    from job import check_replicas, random_stream

    gaps: dict[int, list] = {}
    for seed in range(seeds):
        problem = problems.make("bilinear", dimension, seed=seed)
        x = torch.nn.Parameter(problem.start.float())
        rule = METHODS[method]([x], 1.0)
        opt = hvd_qgenx.DistributedOptimizer(rule, [("x", x)], compression=COMPRESSIONS[choice](seed))
        random = random_stream(seed, hvd.rank(), 0, "cpu")

        def oracle(x, problem=problem, random=random):
            value = problem.operator(x.detach().double())
            return problems.add_noise(value, noise, SIZES[noise], random).float()

        for t, average in play(problem, x, opt, oracle, iterations):
            if t >= FIRST and t & (t - 1) == 0:
                sent = opt.communication
                gaps.setdefault(t, []).append((float(problem.gap(average)), sent.exchanges, sent.bytes_sent))
        check_replicas([x, torch.tensor(rule.gamma, dtype=torch.float64)], iterations)
    row = {"game": "bilinear", "dimension": dimension, "noise": noise, "method": method, "choice": choice,
           "ranks": hvd.size(), "seeds": seeds}  # fmt: skip
    return [
        {**row, "iteration": t, **spread(torch.tensor([gap for gap, *_ in found])), "exchanges": found[0][1],
         "bytes_sent": round(sum(sent for *_, sent in found) / seeds)}
        for t, found in gaps.items()
    ]  # fmt: skip


# ---- the parts -----------------------------------------------------------------------------------------------------


def slopes(scale: int):
    """The bilinear game, every method, noise and with and without 4 bits."""
    for method in DUAL:
        for noise in SIZES:
            for choice in ("none", "bits4"):
                yield from simulate(scale, 8, method=method, noise=noise, choice=choice)


def games(scale: int):
    """The other games, by dual extrapolation."""
    for game in problems.PROBLEMS:
        for noise in SIZES if game != "bilinear" else ():
            for choice in ("none", "bits4"):
                yield from simulate(scale // 4, 8, game=game, method="dual_extrapolation", noise=noise, choice=choice)


def speedup(scale: int):
    """K = 1 to 16 simulated ranks under absolute noise."""
    for ranks in (1, 2, 4, 8, 16):
        for choice in ("none", "bits4"):
            yield from simulate(scale, 8, method="optimistic", noise="absolute", choice=choice, ranks=ranks)


def descent(scale: int):
    """Plain simultaneous descent-ascent, the negative control."""
    yield from simulate(1024, 8, method="sgd")


def real_ranks(scale: int):
    """The same under absolute noise on real processes."""
    for choice in ("none", "bits4"):
        yield from real(scale // 8, 4, 20, "optimistic", "absolute", choice)


def real_bytes(scale: int):
    """Every choice on 10,240 coordinates, where headers do not dominate; two methods for the number of messages."""
    for choice in COMPRESSIONS:
        yield from real(scale // 8, 1, 10_240, "dual_extrapolation", "relative", choice)
    yield from real(scale // 8, 1, 10_240, "optimistic", "relative", "bits4")


PARTS = {"slopes": slopes, "games": games, "speedup": speedup, "descent": descent, "real_ranks": real_ranks,
         "real_bytes": real_bytes}  # fmt: skip
PROCESSES = {"real_ranks": (1, 2, 4), "real_bytes": (2,)}


def run_part(part: str, scale: int) -> None:
    """Runs a part in this process, or under horovodrun as often as it has numbers of processes."""
    replace(part, [])
    for count in PROCESSES.get(part, ()):
        command = ["horovodrun", "--gloo", "-np", str(count), sys.executable, __file__, "--inside", part, "--scale",
                   str(scale)]  # fmt: skip
        # Horovod looks for work once in a cycle, 1 ms by default: most of the time of an exchange this small.
        subprocess.run(command, env={**os.environ, "HOROVOD_CYCLE_TIME": "0.1"}, check=True, timeout=3600)
    if part not in PROCESSES:
        replace(part, list(PARTS[part](scale)))


def run_inside(part: str, scale: int) -> None:
    """One rank of a part with real processes; rank 0 adds its rows."""
    import horovod.torch as hvd

    hvd.init()
    rows = list(PARTS[part](scale))
    if hvd.rank() == 0:
        replace(part, [*read(part), *rows])


def read(part: str | None = None) -> list[dict]:
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return [row for row in csv.DictReader(file) if part in (None, row["part"])]


def replace(part: str, rows: list[dict]) -> None:
    """Writes rates.csv with these rows for a part; new ones get this commit's columns."""
    rows = [row if "commit" in row else {**provenance(), "part": part, **row} for row in rows]
    others = [row for row in read() if row["part"] != part]
    order = list(PARTS)
    FOLDER.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(sorted([*others, *rows], key=lambda row: order.index(row["part"])))


# ---- claims --------------------------------------------------------------------------------------------------------


class Curve:
    """Rows of one setting: gap against iterations."""

    def __init__(self, rows: list[dict]):
        self.rows = sorted(rows, key=lambda row: int(row["iteration"]))
        self.iterations = [int(row["iteration"]) for row in self.rows]
        self.gaps = [float(row["gap"]) for row in self.rows]
        self.last = self.rows[-1]

    @property
    def slope(self) -> float:
        return slope(self.iterations, self.gaps)

    def reaches(self, gap: float) -> float:
        """Iterations to a gap, on straight lines between the points of log and log."""
        logs = np.log(self.gaps)
        return float(np.exp(np.interp(-np.log(gap), -np.minimum.accumulate(logs), np.log(self.iterations))))


def curve(part: str, **setting) -> Curve:
    wanted = {name: str(value) for name, value in setting.items()}
    return Curve([row for row in read(part) if all(row[name] == value for name, value in wanted.items())])


def claims() -> list[tuple[str, str, int, float, float, float]]:
    """(claim, setting, T, measured, least, most), the last two where it counts as reproduced; from rates.csv."""
    found = []
    for method in DUAL:
        for noise, low, high in (("relative", -1.15, -0.85), ("absolute", -0.6, -0.4)):
            low, high = (-0.6, -0.4) if method == "dual_averaging" else (low, high)
            pair = [curve("slopes", method=method, noise=noise, choice=choice) for choice in ("none", "bits4")]
            end = pair[0].iterations[-1]
            for name, one in zip(("float32", "4 bits"), pair, strict=True):
                found.append((f"slope, {noise} noise", f"{method}, {name}", end, one.slope, low, high))
            shift = abs(pair[1].slope - pair[0].slope)
            found.append((f"shift of the slope, {noise} noise", f"{method}, 4 bits", end, shift, 0.0, 0.1))
            gap = max(one.gaps[-1] for one in pair)
            ratio = pair[1].reaches(gap) / pair[0].reaches(gap)
            found.append((f"iterations to a gap, {noise} noise", f"{method}, 4 bits / float32", end, ratio, 0.0, 1.3))
    for choice in ("none", "bits4"):
        few, many = (curve("speedup", choice=choice, ranks=ranks) for ranks in (1, 16))
        end, ratio = few.iterations[-1], few.gaps[-1] / many.gaps[-1]
        found.append(("gap of 1 rank / of 16, absolute noise", f"optimistic, {choice}", end, ratio, 3.4, 4.6))
    dense, coded = (curve("real_bytes", choice=choice, method="dual_extrapolation") for choice in ("none", "bits4"))
    fraction = int(coded.last["bytes_sent"]) / int(dense.last["bytes_sent"])
    end = coded.iterations[-1]
    found.append(("bytes / float32's, d = 10,240", "bits4, 2 processes", end, fraction, 0.0, 1 / 7))
    gap = max(dense.gaps[-1], coded.gaps[-1])
    ratio = coded.reaches(gap) / dense.reaches(gap)
    found.append(("iterations to a gap, d = 10,240", "bits4 / float32", end, ratio, 0.0, 1.3))
    once = curve("real_bytes", choice="bits4", method="optimistic")
    messages = int(once.last["exchanges"]) / int(coded.last["exchanges"])
    found.append(("messages, optimistic / dual extrapolation", "bits4", end, messages, 0.5, 0.5))
    found.append(("gap, optimistic / dual extrapolation", "bits4", end, once.gaps[-1] / coded.gaps[-1], 0.1, 10.0))
    control = curve("descent")
    growth = control.gaps[-1] / control.gaps[0]
    found.append((f"gap at T / after {FIRST} iterations", "sgd", control.iterations[-1], growth, 10.0, float("inf")))
    return found


#: Slopes that theory predicts for the other games, by noise. Strong monotonicity makes the gap quadratic in distance.
#: On a simplex the operator does not vanish at the solution, so that noise relative to it acts as absolute noise.
THEORY = {
    "regularised": {"none": "-2", "relative": "-2", "absolute": "-1"},
    "quadratic": {"none": "-2", "relative": "-1.8 to -2", "absolute": "-0.7"},
    "matrix": {"none": "-1; coded -0.5", "relative": "-0.5", "absolute": "-0.5"},
    "logistic": {"none": "-2; coded -1", "relative": "-1", "absolute": "-1"},
}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace(" --- ", "---") for line in lines)


def table() -> str:
    """Three tables as Markdown: the claims, the other games, real processes."""
    rows = []
    for claim, setting, end, value, low, high in claims():
        window = f"{low:.3g} to {high:.3g}" if high < float("inf") else f"at least {low:.3g}"
        shown = f"{value:.3g}" if low <= value <= high else f"**{value:.3g}**"
        rows.append([claim, setting, str(end), shown, window])
    parts = [markdown(["claim", "setting", "T", "measured", "window"], rows)]
    rows = []
    for game, theory in THEORY.items():
        for noise, expected in theory.items():
            pair = [curve("games", game=game, noise=noise, choice=choice) for choice in ("none", "bits4")]
            end = str(pair[0].iterations[-1])
            rows.append([game, noise, end, expected, *(f"{one.slope:.2f}" for one in pair)])
    parts.append(markdown(["game", "noise", "T", "theory", "float32", "4 bits"], rows))
    rows = []
    for choice in ("none", "bits4"):
        for ranks in PROCESSES["real_ranks"]:
            last = curve("real_ranks", choice=choice, ranks=ranks).last
            rows.append([choice, str(ranks), last["iteration"], f"{last['gap']} ± {last['standard_error']}"])
    parts.append(markdown(["choice", "processes", "T", "gap"], rows))
    return "\n\n".join(parts)


def plot() -> None:
    """rates_compression.png: gap against iterations and bytes; rates_methods.png: gap against iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for choice in COMPRESSIONS:
        one = curve("real_bytes", choice=choice, method="dual_extrapolation")
        axes[0].loglog(one.iterations, one.gaps, marker=".", label={"none": "float32"}.get(choice, choice))
        axes[1].loglog([int(row["bytes_sent"]) for row in one.rows], one.gaps, marker=".")
    axes[0].set(xlabel="iterations", ylabel="restricted gap of the average", title="d = 10,240, 2 processes")
    axes[1].set(xlabel="bytes sent by one rank", title="dual extrapolation, relative noise")
    axes[0].legend()
    figure.savefig(FOLDER / "rates_compression.png", dpi=120)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained", sharey=True)
    for axis, noise in zip(axes, SIZES, strict=True):
        for index, method in enumerate(DUAL):
            for choice, style in (("none", "-"), ("bits4", "--")):
                one = curve("slopes", method=method, noise=noise, choice=choice)
                label = f"{method}{', 4 bits' if choice == 'bits4' else ''}"
                axis.loglog(one.iterations, one.gaps, style, color=f"C{index}", label=label)
        axis.set(xlabel="iterations", title=f"bilinear, d = 20, noise: {noise}")
    axes[0].set_ylabel("restricted gap of the average")
    axes[0].legend(fontsize=8)
    figure.savefig(FOLDER / "rates_methods.png", dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """The command line; None is that of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one part (all)")
    parser.add_argument("--scale", type=int, default=16384, help="iterations of the longest runs (16384)")
    parser.add_argument("--table", action="store_true", help="print the table of claims and end")
    parser.add_argument("--plot", action="store_true", help="draw the pictures and end")
    parser.add_argument("--inside", choices=PROCESSES, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if flags.inside:
        return run_inside(flags.inside, flags.scale)
    alone = flags.table or flags.plot
    for part in [] if alone else [flags.part] if flags.part else PARTS:
        run_part(part, flags.scale)
    if flags.plot or not alone:
        plot()
    if flags.table or not alone:
        print(table())


if __name__ == "__main__":
    main()
