"""The trainer, as a user runs it: real processes, every compression choice."""

import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "train"))
checkpoint = importlib.import_module("checkpoint")
sys.path.remove(str(ROOT / "train"))
SMALL = ["--iterations", "3", "--width", "4", "--batch", "6", "--log-every", "1", "--sample-every", "3"]


def _command(ranks, *flags, launcher=("--gloo",)):
    return ["horovodrun", *launcher, "-np", str(ranks), sys.executable, "train/wgan.py", *flags]


def _train(ranks, out, *flags, **options):
    command = _command(ranks, *SMALL, "--check-replicas", "1", "--out", str(out), *flags, **options)
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-5000:]


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def _rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _summary(out):
    """Read from its file: horovodrun passes the two streams of a rank on in any order, and may lose a piece."""
    return json.loads((out / "summary.json").read_text())


def _size(picture):
    with Image.open(picture) as image:
        return image.size


@pytest.mark.parallel
@pytest.mark.parametrize("compression", ["none", "fp16", "fixed8", "fixed4", "qgenx:bits=3,rate_weight=0.02"])
def test_three_iterations_with_every_compression(tmp_path, compression):
    out = tmp_path / "run"
    _train(2, out, "--compression", compression, "--data", "digits")
    assert _summary(out)["outcome"] == "Finished, all replicas bit-identical"
    rows = _rows(out)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    wanted = {"iteration", "seconds", "loss_generator", "loss_critic", "bytes_sent", "bits_per_coordinate"}
    assert all(wanted <= row.keys() for row in rows)
    assert rows[0]["bytes_sent"] < rows[2]["bytes_sent"]
    config = json.loads((out / "config.json").read_text())
    assert config["compression"] == compression and config["world_size"] == 2
    assert [_size(out / f"samples_{i:06d}.png") for i in (0, 3)] == [(256, 256)] * 2


@pytest.mark.parallel
def test_the_plain_command_on_three_ranks_with_cifar_10_where_it_can_be_had(tmp_path):
    out = tmp_path / "run"
    _train(3, out, launcher=())
    assert json.loads((out / "config.json").read_text())["world_size"] == 3
    assert len(_rows(out)) == 3


# ---- cut off, and taken up again


LONG = ["--width", "4", "--batch", "6", "--log-every", "1", "--checkpoint-every", "3", "--data", "digits"]
LONG += ["--lookahead", "2"]


def _started(command):
    """A job in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _checkpointed(out, count=2):
    """Whether a run has got so far."""
    return len(checkpoint.saved(out)) >= count


def _interrupted(out, number):
    job = _started(_command(2, *LONG, "--iterations", "100000", "--out", str(out)))
    _wait_until(lambda: _checkpointed(out))
    os.killpg(job.pid, number)
    if number == signal.SIGKILL:  # the launcher is gone, and could not end its ranks
        _end_ranks(out)
    job.communicate(timeout=60)


def _end_ranks(out):
    """Kills, one by one, the processes whose command names this run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass


def _equal(one, other):
    """Whether two checkpoints hold the same bits; the seconds are those of two runs."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parallel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_run_goes_on_to_the_bits_of_one_that_was_not(tmp_path, number):
    out, whole = tmp_path / "run", tmp_path / "whole"
    _interrupted(out, number)
    if number == signal.SIGINT:
        assert _summary(out)["outcome"] == "Stopped"
    done = checkpoint.load_last(out)[0]["iteration"]
    iterations = ["--iterations", str(done + 3)]
    for flags in (["--resume", str(out)], ["--out", str(whole), *LONG]):
        command = _command(2, *flags, *iterations, "--check-replicas", "1000")
        ended = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout[-3000:]
    resumed, straight = (checkpoint.load_last(folder)[0] for folder in (out, whole))
    for content in (resumed, straight):
        # A job that goes on asks all ranks anew whether they agree: those bytes are sent once more.
        del content["counts"][0]["bytes_sent"]
    assert _equal(resumed, straight)
    losses = [[(row["iteration"], row["loss_critic"]) for row in _rows(folder)] for folder in (out, whole)]
    assert losses[0] == losses[1]


def test_sigterm_saves_exits_with_0_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    job = _started([sys.executable, "train/wgan.py", *LONG, "--iterations", "100000", "--out", str(out)])
    _wait_until(lambda: _checkpointed(out))
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and said.rstrip().endswith(f"Go on: --resume {out}")
    content, _ = checkpoint.load_last(out)
    assert content["iteration"] >= _rows(out)[-1]["iteration"]


@pytest.mark.parallel
def test_another_number_of_ranks_goes_on_and_says_what_is_new(tmp_path):
    out = tmp_path / "run"
    assert _alone(*LONG, "--iterations", "2", "--out", str(out)).returncode == 0
    command = _command(2, "--resume", str(out), "--iterations", "4", "--check-replicas", "1")
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 ranks go on where 1 were. Weights, moving average" in done.stdout
    assert [row["iteration"] for row in _rows(out)] == [1, 2, 3, 4]


# ---- what is wrong is one sentence, and nothing is lost


def _alone(*flags, **environment):
    return subprocess.run(
        [sys.executable, "train/wgan.py", *flags],
        cwd=ROOT,
        env={**_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _refused(*flags, **environment):
    """The one sentence of a run that ends with code 1."""
    done = _alone(*flags, **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("wgan.py: "))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two iterations."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert _alone(*LONG, "--iterations", "2", "--out", str(out)).returncode == 0
    return out


def _copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["broken", "foreign"])
def test_a_run_without_a_checkpoint_that_can_be_read_is_refused(tmp_path, finished, damage):
    run = _copy(finished, tmp_path)
    for path in checkpoint.saved(run):
        if damage == "broken":
            path.write_bytes(path.read_bytes()[:-20])
        else:
            path.unlink()
    before = sorted(path.name for path in run.iterdir())
    assert f"{run} has no checkpoint to go on from." in _refused("--resume", str(run))
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_that_goes_on_keeps_its_settings(tmp_path, finished):
    run = _copy(finished, tmp_path)
    assert f"The run in {run} has --width 4, not 5." in _refused("--resume", str(run), "--width", "5")


def test_a_folder_in_use_is_left_alone(tmp_path, finished):
    run = _copy(finished, tmp_path)
    with open(run / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"The run in {run} is in use by another job." in _refused("--resume", str(run))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, finished):
    run = _copy(finished, tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    assert "already holds a run; choose another --out, or go on with it by --resume" in _refused(
        *LONG, "--out", str(run)
    )
    assert (run / "metrics.jsonl").read_bytes() == before


def test_missing_weights_are_told_before_training_begins(tmp_path):
    nowhere = {"TORCH_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "https_proxy": "http://127.0.0.1:9"}
    said = _refused(*LONG, "--score-every", "1", "--out", str(tmp_path / "run"), **nowhere)
    assert said.startswith("wgan.py: the Inception weights for FID cannot be had: pytorch-fid's release: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    done = _alone("--device", "cuda")
    assert done.returncode == 2 and done.stderr.endswith("--device cuda: torch finds no CUDA device here\n")


def _all_refused(ranks, *flags):
    """What the ranks say of a job that ends with another code than 0; each says it, on whatever stream."""
    command = _command(ranks, *LONG, *flags)
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    return "".join(line for line in (done.stdout + done.stderr).splitlines(True) if "wgan.py: " in line)


@pytest.mark.parallel
def test_a_full_disk_at_a_checkpoint_ends_all_ranks_and_loses_nothing(tmp_path):
    out = tmp_path / "run"
    assert _alone(*LONG, "--iterations", "2", "--out", str(out)).returncode == 0
    (kept,) = checkpoint.saved(out)
    os.symlink("/dev/full", out / "checkpoint.partial")
    said = _all_refused(2, "--resume", str(out), "--iterations", "5")
    assert f"The checkpoint cannot be written to {out} (No space left on device)." in said
    assert checkpoint.saved(out) == [kept]


@pytest.mark.parallel
def test_training_that_diverges_ends_all_ranks_and_saves_no_nan(tmp_path):
    out = tmp_path / "run"
    said = _all_refused(2, "--lr-critic", "1e30", "--iterations", "9", "--out", str(out), "--compression", "none")
    assert "not finite at iteration" in said and "lower the learning rates" in said
    for path in checkpoint.saved(out):
        assert all(bool(value.isfinite().all()) for value in checkpoint.load(path)["game"].values())


@pytest.mark.parallel
def test_a_batch_smaller_than_the_number_of_ranks_is_refused(tmp_path):
    assert "--batch 1 is too small: each of the 2 ranks needs an image." in _all_refused(
        2, "--batch", "1", "--out", str(tmp_path / "run")
    )


# ---- where the time goes


def test_a_trace_names_the_parts_of_an_iteration_and_metrics_have_them_as_columns(tmp_path):
    out = tmp_path / "run"
    assert _alone(*LONG, "--iterations", "4", "--trace", "1", "--autocast", "--out", str(out)).returncode == 0
    names = {event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"train.data", "train.forward", "train.backward", "train.update"} <= names
    row = _rows(out)[-1]
    parts = [row[f"ms_{part}"] for part in ("data", "forward", "backward", "encode", "wait", "decode", "update")]
    assert row["ms_forward"] > 0 and row["ms_backward"] > 0
    assert sum(parts) <= 1000 * (row["seconds"] - _rows(out)[-2]["seconds"]) + 1  # rounded to milliseconds
    assert _size(out / "time.png")[0] > 0


def test_one_process_prints_its_summary_last(tmp_path):
    command = [sys.executable, "train/wgan.py", *SMALL, "--data", "digits", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Finished: 3 iterations in ")


def _wait_until(condition, seconds=120):
    for _ in range(seconds * 10):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing was logged in two minutes")


WHOLE = ["iterations", "width", "batch", "log-every", "sample-every", "latent", "seed", "check-replicas"]
WHOLE += [
    "critic-steps",
    "score-every",
    "score-samples",
    "reference",
    "checkpoint-every",
    "threads",
    "trace",
    "lookahead",
]
REAL = ["minutes", "lr-generator", "lr-critic", "average", "penalty", "drift", "beta1", "step-scale"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compression", "zip"], "invalid choice: 'zip'"),
        (["--batch", "0"], "'0' is not a whole number from 1 to 1048576"),
        (["--lr-critic", "nan"], "'nan' is not a positive number"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, message):
    done = subprocess.run(
        [sys.executable, "train/wgan.py", *flags], cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def parse(monkeypatch, capsys):
    """The trainer's own parser: what it says of wrong flags."""
    monkeypatch.syspath_prepend(ROOT / "train")
    from settings import parse_flags

    def refusal(*flags):
        with pytest.raises(SystemExit) as ended:
            parse_flags("", list(flags))
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refusal


@pytest.mark.parametrize("flag", WHOLE)
@pytest.mark.parametrize("text", ["-1", "99999999999999999999", "9" * 5000, "1.5", "\u00b2", "nan", ""])
def test_every_whole_number_has_a_range_and_one_sentence(parse, flag, text):
    assert parse(f"--{flag}={text}").startswith(
        f"wgan.py: error: argument --{flag}: {text[:40]!r} is not a whole number"
    )


@pytest.mark.parametrize("flag", REAL)
@pytest.mark.parametrize("text", ["-1", "inf", "nan", "1e999", "many"])
def test_every_real_number_has_a_range_and_one_sentence(parse, flag, text):
    assert parse(f"--{flag}={text}").startswith(f"wgan.py: error: argument --{flag}: {text!r} is not a ")


def test_every_flag_that_takes_a_number_is_among_these(parse):
    source = (ROOT / "train" / "settings.py").read_text()
    numeric = [line.split('"')[1] for line in source.splitlines() if 'add("--' in line and "type=" in line]
    assert {f"--{flag}" for flag in [*WHOLE, *REAL]} >= set(numeric) - {
        "--out",
        "--config",
        "--resume",
        "--compression",
    }


def test_the_largest_seed_is_one_that_torch_takes_in_every_epoch(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "train")
    from job import MOST_SEED, random_stream

    random_stream(MOST_SEED, 0, 0, "cpu")
    torch.Generator().manual_seed(MOST_SEED + 2**31)
