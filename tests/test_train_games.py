"""train/games.py, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import horovod.torch as hvd
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def games():
    """train/games.py, a script beside other scripts, in this process alone."""
    saved = list(sys.path)
    sys.path.insert(0, str(ROOT / "train"))
    import games

    hvd.init()
    yield games
    sys.path[:] = saved


def _played(out):
    """The summary and the rows of a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


@pytest.mark.parallel
@pytest.mark.slow
def test_two_processes_agree_bit_for_bit_and_leave_a_picture(tmp_path):
    out = tmp_path / "run"
    done = subprocess.run(
        ["horovodrun", "--gloo", "-np", "2", sys.executable, "train/games.py", "--iterations", "64", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        timeout=200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    summary, rows = _played(out)
    assert summary["outcome"] == "Finished, parameters and step sizes bit-identical on all ranks"
    assert [row["iteration"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[-1]["gap"] < rows[0]["gap"] / 5 and summary["slope"] < -0.5
    assert rows[-1]["exchanges"] == 128 and rows[-1]["bytes_sent"] > rows[0]["bytes_sent"] > 0
    assert (tmp_path / "run" / "gap.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["world_size"] == 2 and config["coordinates"] == 20


def test_plain_descent_diverges_and_is_told_so(tmp_path, games, capsys):
    flags = ["--method", "sgd", "--noise", "none", "--iterations", "5000", "--out", str(tmp_path)]
    games.train(games.parse_flags(flags))
    summary, _ = _played(tmp_path)
    assert summary["outcome"].startswith("Diverged") and summary["gap"] > 100 and summary["iteration"] < 1000
    assert capsys.readouterr().out.splitlines()[-1].startswith("Diverged")


@pytest.mark.slow
@pytest.mark.parametrize("game", ["regularised", "quadratic", "matrix", "logistic"])
@pytest.mark.parametrize("method", ["optimistic", "past_sgd"])
def test_every_other_game_is_played(tmp_path, games, game, method):
    flags = ["--game", game, "--method", method, "--compression", "none", "--iterations", "33", "--out", str(tmp_path)]
    games.train(games.parse_flags(flags))
    summary, rows = _played(tmp_path)
    assert rows[-1]["iteration"] == 33 and 0 < summary["gap"] < rows[0]["gap"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--game", "chess"], "invalid choice: 'chess'"),
        (["--dimension", "7"], "dimension must be even, and beyond 20 a multiple of it, got 7"),
        (["--iterations", "0"], "'0' is not a whole number from 1 to"),
        (["--scale", "-1"], "'-1' is not a positive number"),
    ],
)
def test_a_wrong_flag_is_one_sentence(games, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        games.parse_flags(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, games):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="already holds a run; choose another --out"):
        games.train(games.parse_flags(["--out", str(tmp_path)]))
