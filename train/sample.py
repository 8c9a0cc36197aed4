"""Pictures from a run's moving-average generator.

python train/sample.py RUN                                  # grid.png and interpolation.png in RUN
python train/sample.py RUN --folder pictures --count 1000   # single PNGs, as pytorch-fid reads them
"""

import argparse
import sys
from pathlib import Path

import torch
from checkpoint import CheckpointError
from evaluation import generate
from finished import Run, open_run
from job import random_stream, whole
from pictures import save_grid
from PIL import Image

COLUMNS = 8
AT_ONCE = 100


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder of a run of train/wgan.py")
    add("--checkpoint", type=Path, help="one of its files (the last)")
    add("--rows", type=whole(1), default=8, help="of the grid and of the interpolation, 8 pictures each (8)")
    add("--folder", type=Path, help="write single PNGs into this folder instead")
    add("--count", type=whole(1), default=1000, help="how many of them (1000)")
    add("--seed", type=whole(0), help="of the noise (the run's)")
    return parser.parse_args(arguments)


def grid(found: Run, rows: int, seed: int) -> torch.Tensor:
    """(8 rows, 3, 32, 32)."""
    return found.generator(_noise(found, COLUMNS * rows, seed))


def interpolation(found: Run, rows: int, seed: int) -> torch.Tensor:
    """(8 rows, 3, 32, 32): each row goes from one point of the noise to another, along the arc of a circle.

    Points on the straight line between two normal vectors are shorter than any that the generator has seen.
    """
    starts, ends = _noise(found, 2 * rows, seed).chunk(2)
    angle = torch.linspace(0, torch.pi / 2, COLUMNS)[None, :, None]
    arc = torch.cos(angle) * starts[:, None] + torch.sin(angle) * ends[:, None]
    return found.generator(arc.flatten(0, 1))


def _noise(found: Run, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, found.config["latent"], generator=random_stream(seed, 0, 4, "cpu"))


def write_single(found: Run, folder: Path, count: int, seed: int) -> None:
    """The pictures that a score with this seed looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, AT_ONCE):
        indices = range(start, min(start + AT_ONCE, count))
        images = generate(found.generator, found.config["latent"], seed, indices, "cpu")
        for index, image in zip(indices, images, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:06d}.png")


def main(flags: argparse.Namespace) -> None:
    found = open_run(flags.run, flags.checkpoint)
    seed = found.config["seed"] if flags.seed is None else flags.seed
    if flags.folder:
        write_single(found, flags.folder, flags.count, seed)
        print(f"{flags.folder}: {flags.count} pictures of iteration {found.iteration}")
        return
    for name, make in (("grid", grid), ("interpolation", interpolation)):
        save_grid(make(found, flags.rows, seed), flags.run / f"{name}.png", COLUMNS)
        print(f"{flags.run / name}.png: iteration {found.iteration}")


if __name__ == "__main__":
    try:
        main(parse_flags())
    except (CheckpointError, OSError) as error:
        sys.exit(f"sample.py: {error}")
