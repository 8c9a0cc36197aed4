"""FID and KID of a run's moving-average generator, at any checkpoint.

    python train/score.py runs/20260101-120000-qgenx --samples 1000
    python train/score.py RUN --checkpoint RUN/checkpoint-0000000500-0123456789abcdef.pt --reference 50000 --device cuda
    horovodrun -np 3 python train/score.py RUN --samples 10000          # ranks share the work

FIDs are comparable at equal numbers of samples and reference images only, so both are printed. A line is added to the
run's scores.jsonl where ``--keep`` is given.
"""

import argparse
import json
import sys
from pathlib import Path

import world
from checkpoint import CheckpointError
from data import CHOICES, SourceError, load_images
from evaluation import Evaluation
from finished import open_run
from job import run, whole
from record import SCORES


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run of train/wgan.py")
    add("--checkpoint", type=Path, help="one of its files (the last)")
    add("--samples", type=whole(3), help="images to generate (as the run's own scores)")
    add("--reference", type=whole(3), help="training images to compare with (as the run's own scores)")
    add("--data", choices=CHOICES, help="(as the run)")
    add("--seed", type=whole(0), help="of the samples (the run's)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--keep", action="store_true", help="add the score to the run's scores.jsonl")
    return parser.parse_args(arguments)


def score(flags: argparse.Namespace) -> None:
    found = open_run(flags.run, flags.checkpoint, flags.device)
    config = found.config
    images, _ = load_images(flags.data or config["data"])
    samples, reference = flags.samples or config["score_samples"], flags.reference or config["reference"]
    seed = config["seed"] if flags.seed is None else flags.seed
    evaluation = Evaluation(images, samples, reference, flags.device, lambda: False)
    scores = evaluation.score(found.generator, config["latent"], seed)
    if world.rank() != 0:
        return
    print(f"iteration {found.iteration}: {scores}", flush=True)
    if flags.keep:
        with open(flags.run / SCORES, "a") as file:
            file.write(json.dumps({"iteration": found.iteration, **scores._asdict()}) + "\n")


if __name__ == "__main__":
    flags = parse_flags()
    sys.exit(run(lambda: score(flags), "score.py", SourceError, CheckpointError))
