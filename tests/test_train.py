"""The trainer, as a user runs it: real processes, every compression choice."""

import json
import os
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
@pytest.mark.parametrize("compression", ["none", "fp16", "fixed8", "fixed4", "qgenx"])
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


@pytest.mark.parallel
def test_ctrl_c_ends_all_ranks_and_leaves_a_summary(tmp_path):
    out = tmp_path / "run"
    flags = ["--iterations", "100000", "--width", "4", "--batch", "6", "--log-every", "1", "--data", "digits"]
    job = subprocess.Popen(
        _command(2, *flags, "--out", str(out)),
        cwd=ROOT,
        env=_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _wait_until(lambda: (out / "metrics.jsonl").exists())
    os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=60)
    assert _summary(out)["outcome"] == "Stopped"


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
REAL = ["minutes", "lr-generator", "lr-critic", "average", "penalty"]


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
    from wgan import parse_flags

    def refusal(*flags):
        monkeypatch.setattr(sys, "argv", ["wgan.py", *flags])
        with pytest.raises(SystemExit) as ended:
            parse_flags()
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
    source = (ROOT / "train" / "wgan.py").read_text()
    numeric = [line.split('"')[1] for line in source.splitlines() if 'add("--' in line and "type=" in line]
    assert {f"--{flag}" for flag in [*WHOLE, *REAL]} >= set(numeric) - {"--out"}


def test_the_largest_seed_is_one_that_torch_takes_in_every_epoch(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "train")
    from job import MOST_SEED, random_stream

    random_stream(MOST_SEED, 0, 0, "cpu")
    torch.Generator().manual_seed(MOST_SEED + 2**31)
