"""FID and KID of a generator against the training images, by all ranks together.

Each rank generates and looks at its share of the samples; sums over features are added up across ranks. The samples
depend on the seed alone, not on the number of ranks. The training images' features are computed once, by all ranks, and
kept in the cache under the hash of those images.
"""

import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import world
from data import SourceError, announce, cache_folder
from fid import Moments, frechet_distance, kernel_distance
from inception import AT_ONCE, FEATURES, Inception, fetch_weights, fid_network
from job import random_stream
from torch import Tensor

MOST_FOR_KID = 10_000  # features on either side: its sums grow with their product
AT_ONCE_ON_CPU = 8  # a signal is noticed between two portions


class Scores(NamedTuple):
    fid: float
    kid: float
    kid_error: float
    samples: int
    reference: int

    def __str__(self) -> str:
        return (
            f"FID {self.fid:.2f}, KID {self.kid:.5f} +- {self.kid_error:.5f} "
            f"({self.samples} samples against {self.reference} training images)"
        )


class Features(NamedTuple):
    """Of a set of images: their moments, and the features themselves of the first MOST_FOR_KID."""

    moments: Moments
    rows: Tensor


def share(count: int) -> range:
    """This rank's part of `count` things."""
    rank, size = world.rank(), world.size()
    return range(count * rank // size, count * (rank + 1) // size)


def as_bytes(images: Tensor) -> np.ndarray:
    """Float images in [-1, 1] as the uint8 that a PNG of them holds."""
    return images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()


def generate(generator: torch.nn.Module, latent: int, seed: int, indices: range, device: str) -> np.ndarray:
    """Samples number `indices`, uint8 (n, 3, 32, 32); each depends on the seed and on its number alone."""
    noise = torch.stack([torch.randn(latent, generator=random_stream(seed, index, 2, "cpu")) for index in indices])
    with torch.no_grad():
        return as_bytes(generator(noise.to(device)))


class Evaluation:
    """Made on all ranks. Raises SourceError on all ranks if the network's weights cannot be had."""

    def __init__(self, images: np.ndarray, samples: int, reference: int, device: str, stopped: Callable[[], bool]):
        self.samples, self.device, self.stopped = samples, device, stopped
        fetch_weights_everywhere()
        self.inception = Inception(device)
        chosen = np.random.default_rng(0).permutation(len(images))[:reference]
        self.reference = self._reference(images, np.sort(chosen))

    def score(self, generator: torch.nn.Module, latent: int, seed: int) -> Scores | None:
        """The scores on rank 0, None on other ranks; None everywhere if the run was stopped meanwhile."""
        found = self._features(lambda part: generate(generator, latent, seed, part, self.device), self.samples)
        if found is None or self.reference is None or world.rank() != 0:
            return None
        kid = kernel_distance(found.rows, self.reference.rows)
        distance = frechet_distance(found.moments, self.reference.moments)
        return Scores(distance, kid.value, kid.error, found.moments.count, self.reference.moments.count)

    def _reference(self, images: np.ndarray, chosen: np.ndarray) -> Features | None:
        path = cache_folder() / f"inception-{_hash(images, chosen)}.pt"
        if all(world.gather_objects(path.exists(), "train.reference")):
            saved = torch.load(path, weights_only=True)
            return Features(Moments(saved["count"], saved["first"], saved["second"]), saved["rows"])
        announce(f"Notice: computing features of {len(chosen)} training images, once; they are kept in {path.parent}.")
        found = self._features(lambda part: images[chosen[part.start : part.stop]], len(chosen))
        if found is not None and world.local_rank() == 0:
            moments = found.moments
            _keep(path, {"count": moments.count, "first": moments.first, "second": moments.second, "rows": found.rows})
        return found

    def _features(self, images_of: Callable[[range], np.ndarray], count: int) -> Features | None:
        """Of `count` images that the ranks look at together; None if the run was stopped."""
        mine, at_once = share(count), AT_ONCE if self.device == "cuda" else AT_ONCE_ON_CPU
        found = [torch.zeros(0, FEATURES)]
        # All ranks ask equally often, whatever their shares are.
        for start in range(0, -(-count // world.size()), at_once):
            if self.stopped():
                return None
            if part := mine[start : start + at_once]:
                found.append(self.inception.features(images_of(part)))
        return _together(torch.cat(found))


def _together(features: Tensor) -> Features:
    own = Moments.of(features)
    first, second = world.total(own.first, "train.first"), world.total(own.second, "train.second")
    count = int(world.total(torch.tensor([own.count]), "train.count"))
    rows = world.gather(features[: -(-MOST_FOR_KID // world.size())], "train.rows")
    return Features(Moments(count, first, second), rows[:MOST_FOR_KID])


def fetch_weights_everywhere() -> None:
    """Raises SourceError on all ranks, with one sentence, if a host cannot have the network or its weights."""
    problem = None
    try:
        fid_network()
        fetch_weights()
    except SourceError as error:
        problem = str(error)
    world.agree(problem, "train.inception", SourceError)


def _hash(images: np.ndarray, chosen: np.ndarray) -> str:
    digest = sha256()
    for start in range(0, len(chosen), 1000):
        digest.update(np.ascontiguousarray(images[chosen[start : start + 1000]]))
    return digest.hexdigest()[:16]


def _keep(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="new-", suffix=".pt", delete=False) as partial:
        torch.save(content, partial)
    os.replace(partial.name, path)
