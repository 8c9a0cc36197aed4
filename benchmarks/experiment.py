"""The experiment of the Q-GenX paper: one training at equal seed and size for each compression, ending in its Figure 1.

    make experiment                                             # 3 ranks here; meant for an hour on 2 cores
    make experiment ARGS="--seeds 3"                            # three times as long
    make experiment ARGS="--rate 100mbit --seeds 3"             # on 3 hosts of benchmarks/laboratory.py, as root
    make experiment PRESET=paper HOSTS=node1,node2,node3        # the full thing, one GPU per host

Every run is a folder under runs/; a run that is there is not made again, and one that was cut off goes on, so that the
same command continues after Ctrl-C. At the end train/compare.py draws NAME.png and NAME_brief.png and writes NAME.md
and NAME.csv. With --out NAME, the small files of finished runs are kept in the folder NAME too, and not made again
where they are there: so runs of several days, or machines of one kind, become one figure.

What the small size can show: bytes, time, and whether compression changes where training goes. It cannot show the
paper's FIDs: its networks are smaller, its iterations are a thousandth, and FID at a few hundred samples has a large
bias. KID has none, but a standard error, which is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from laboratory import LaboratoryError, horovodrun, laboratory
from records import ROOT, provenance

COMPRESSIONS = ("none", "fp16", "fixed8", "fixed4", "qgenx:bits=4", "qgenx:bits=3")
TRAIN = ROOT / "train"
RESULTS = ROOT / "benchmarks" / "results" / "experiment.csv"
#: Of the size "small": meant for six runs in an hour on 2 cores. These networks are cheap to compute for what there is
#: to send: a gradient in float32 is 2.7 MB.
SMALL = {
    "model": "dcgan",
    "iterations": "1200",
    "minutes": "600",
    "width": "24",
    "latent": "64",
    "batch": "48",
    "lr-generator": "2e-4",
    "lr-critic": "2e-3",
    "beta1": "0.5",
    "average": "0.97",
    "log-every": "10",
    "sample-every": "400",
    "checkpoint-every": "150",
    "score-every": "150",
    "score-samples": "192",
    "reference": "1000",
    "data": "auto",
}
#: One of seconds, for tests.
TINY = {
    **SMALL,
    "iterations": "4",
    "width": "4",
    "latent": "8",
    "batch": "6",
    "log-every": "1",
    "score-every": "2",
    "score-samples": "6",
    "reference": "6",
    "data": "digits",
}
SIZES = {"small": SMALL, "tiny": TINY}
#: What is kept of a run: no weights and no pictures.
KEPT = ("config.json", "metrics.jsonl", "scores.jsonl", "summary.json")
MADE = "made.json"  # on which links, at which commit, when and on which device
Launch = Callable[[list[str]], int]


def settings(size: str) -> list[str]:
    """Flags of train/wgan.py: of a size above, or of a preset of the trainer."""
    if size not in SIZES:
        return ["--preset", size, "--device", "cuda"]
    return [word for name, value in SIZES[size].items() for word in (f"--{name}", value)]


def run_folder(base: Path, compression: str, seed: int) -> Path:
    return base / f"{compression.replace(':', '-').replace('=', '')}-seed{seed}"


def state(folder: Path) -> str:
    """ "new", "begun" or "finished"."""
    try:
        outcome = json.loads((folder / "summary.json").read_text())["outcome"]
    except (OSError, json.JSONDecodeError):
        outcome = ""
    if outcome.startswith("Finished"):
        return "finished"
    return "begun" if list(folder.glob("checkpoint-*.pt")) else "new"


def one_run(launch: Launch, folder: Path, flags: list[str]) -> int:
    """Makes a run, or goes on with it; the exit code of the trainer."""
    found = state(folder)
    if found == "finished":
        print(f"{folder}: is there", flush=True)
        return 0
    if found == "new" and folder.exists():
        # It ended before its first checkpoint: nothing in it is of use, and the name is wanted.
        folder.rename(folder.with_name(f"{folder.name}-cut-off-{os.getpid()}"))
    print(f"{folder}: {'goes on' if found == 'begun' else 'begins'}", flush=True)
    where = ["--resume", str(folder)] if found == "begun" else ["--out", str(folder), *flags]
    return launch([sys.executable, str(TRAIN / "wgan.py"), *where])


@contextmanager
def launcher(flags: argparse.Namespace):
    """What starts a command on all ranks: here, on hosts, or in the laboratory."""
    # Tools and scripts of this environment, this checkout's package, and what horovodrun needs of PATH on other hosts.
    beside = str(Path(sys.executable).parent)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    if flags.rate:
        with laboratory(flags.ranks, flags.rate) as lab:
            yield lambda command: lab.run(command, env=env, cwd=ROOT).returncode
        return
    hosts = ["-H", ",".join(f"{host}:1" for host in flags.hosts)] if flags.hosts else ["--gloo"]
    start = [horovodrun(), *hosts, "-np", str(len(flags.hosts) or flags.ranks)]
    yield lambda command: subprocess.run([*start, *command], env=env, cwd=ROOT).returncode


def experiment(flags: argparse.Namespace) -> int:
    base = ROOT / "runs" / name_of(flags)
    out = flags.out or base / "figure"
    plan = [(seed, compression) for seed in range(flags.seeds) for compression in flags.compressions]
    with launcher(flags) as launch:
        for seed, compression in plan:
            folder = run_folder(base, compression, seed)
            if state(out / folder.name) == "finished":
                print(f"{out / folder.name}: is there", flush=True)
                continue
            words = [*settings(flags.size), "--seed", str(seed), "--compression", compression]
            # The laboratory's hosts share this machine's cores, and each believes that they are its own.
            words += [*(["--threads", "1"] if flags.rate else []), *flags.flags]
            code = one_run(launch, folder, words)
            if code or state(folder) != "finished":
                print(f"experiment.py: {folder} did not finish; the same command goes on from here.", file=sys.stderr)
                return code or 1
            keep(folder, out / folder.name, flags.rate)
    kept = [run_folder(out, compression, seed) for seed, compression in plan]
    code = subprocess.run([sys.executable, str(TRAIN / "compare.py"), *map(str, kept), "--out", str(out)]).returncode
    if not code:
        sign(out.with_suffix(".csv"), kept)
    return code


def keep(folder: Path, target: Path, rate: str | None) -> None:
    """Copies what tables and figures are made of; of its settings all but where the run was."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(folder / name, target / name)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "out": folder.name}, indent=2) + "\n")
    (target / MADE).write_text(json.dumps({"rate": rate or "none", **provenance()}) + "\n")


def table(brief: bool = False) -> str:
    """Of the committed rows, as docs/experiment.md shows them; ``brief`` as README does."""
    sys.path.insert(0, str(TRAIN))
    import compare

    groups = compare.read_csv(RESULTS)
    return compare.brief_table(groups) if brief else compare.table(groups)


def brief_table() -> str:
    return table(brief=True)


def sign(path: Path, folders: list[Path]) -> None:
    """Adds to every row of a CSV how its run was made."""
    made = {}
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        made[config["compression"], str(config["seed"])] = json.loads((folder / MADE).read_text())
    with open(path, newline="") as file:
        # A label tells other differences after the compression.
        rows = [{**row, **made[row["label"].split(", ")[0], row["seed"]]} for row in csv.DictReader(file)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def name_of(flags: argparse.Namespace) -> str:
    """Of the folder under runs/: runs of another size, rate or number of ranks are other runs."""
    ranks = len(flags.hosts) or flags.ranks
    return "-".join(["experiment", flags.size, f"{ranks}ranks", *([flags.rate] if flags.rate else [])])


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="small", help=f"{', '.join(SIZES)}, or a preset of train/wgan.py on GPUs (small)")
    add("--seeds", type=int, default=1, help="how many, from 0 (1)")
    add("--ranks", type=int, default=3, help="where no hosts are given (3)")
    add("--hosts", type=lambda text: text.split(",") if text else [], default=[], help="node1,node2,...: one rank each")
    add("--rate", help="in the laboratory, with links of this rate, as 100mbit; needs root")
    add("--compressions", nargs="+", default=COMPRESSIONS, help="as train/wgan.py takes them")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train/wgan.py; the last of all")
    add("--out", type=Path, help="name of the figure, without an ending (in the folder of the runs)")
    flags = parser.parse_args(arguments)
    if flags.seeds < 1 or flags.ranks < 1:
        parser.error("--seeds and --ranks must be at least 1")
    if flags.rate and flags.hosts:
        parser.error("--rate makes hosts of its own: leave --hosts away")
    return flags


if __name__ == "__main__":
    try:
        sys.exit(experiment(parse_flags()))
    except LaboratoryError as error:
        sys.exit(f"experiment.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
