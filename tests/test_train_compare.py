"""train/compare.py, score.py, sample.py, record.py's trackers, and benchmarks/experiment.py."""

import csv
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("horovod.torch", reason="the trainer runs on Horovod")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "train"), str(ROOT / "benchmarks")]
compare, sample, checkpoint = (importlib.import_module(name) for name in ("compare", "sample", "checkpoint"))
experiment, quick_search = (importlib.import_module(name) for name in ("experiment", "quick_search"))
del sys.path[:2]


def made_run(folder: Path, compression: str, seed: int, kids: list[float], seconds: float = 10.0, **config) -> Path:
    """A run's files as train/wgan.py writes them, with a score every 10 iterations."""
    folder.mkdir(parents=True)
    settings = {"compression": compression, "seed": seed, "width": 4, "out": str(folder), **config}
    (folder / "config.json").write_text(json.dumps(settings))
    lines, scores = [], []
    for index, kid in enumerate(kids, start=1):
        row = {"iteration": 10 * index, "seconds": seconds * index, "bytes_sent": 1000 * index}
        row |= {"bits_per_coordinate": 4.0, "ms_forward": 2.0, "ms_wait": 1.0}
        lines.append(json.dumps(row))
        scores.append(
            json.dumps({**row, "fid": 100 * kid, "kid": kid, "kid_error": 0.01, "samples": 9, "reference": 8})
        )
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "scores.jsonl").write_text("\n".join(scores) + "\n")
    return folder


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_mean_and_spread(tmp_path):
    folders = [
        made_run(tmp_path / "a", "qgenx", 0, [0.5, 0.2], seconds=4.0),
        made_run(tmp_path / "b", "none", 0, [0.4, 0.2]),
        made_run(tmp_path / "c", "none", 1, [0.4, 0.3]),
    ]
    text = compare.compare(folders, tmp_path / "figure")
    none, qgenx = (line.split(" | ") for line in text.splitlines()[2:4])
    assert none[:2] == ["| `none`", "2"] and none[4] == "0.2500 (0.2000 to 0.3000)"
    # qgenx passes 0.3, the highest that float32 ends in, at 2/3 of the way from 0.5 to 0.2: after 4 + 2/3 of 4 seconds.
    assert qgenx[:2] == ["| `qgenx`", "1"] and qgenx[-1] == "7 |"
    assert "FID and KID of 9 samples against 8 training images." in text
    assert (tmp_path / "figure.md").read_text() == text + "\n"
    with open(tmp_path / "figure.csv", newline="") as file:
        assert [row["kid"] for row in csv.DictReader(file)] == ["0.4", "0.2", "0.4", "0.3", "0.5", "0.2"]
    assert compare.table(compare.read_csv(tmp_path / "figure.csv")) == text
    for name in ("figure.png", "figure_brief.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 1000


def test_other_differences_are_in_the_label(tmp_path):
    folders = [made_run(tmp_path / str(width), "none", 0, [0.1], width=width) for width in (4, 8)]
    labels = [group.label for group in compare.grouped([compare.read_run(folder) for folder in folders])]
    assert labels == ["none, width 4", "none, width 8"]


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert compare.main([str(tmp_path), "--out", str(tmp_path / "figure")]) == 1
    assert capsys.readouterr().err.startswith(f"compare.py: {tmp_path} holds no run")


def test_time_to_a_score_that_is_never_reached_is_not_a_number(tmp_path):
    runs = [compare.read_run(made_run(tmp_path / str(seed), "none", seed, [0.5, 0.4 - seed / 5])) for seed in (0, 1)]
    (group,) = compare.grouped(runs)
    assert np.isnan(compare.seconds_to(group, 0.29)) and compare.seconds_to(group, 0.5) == 10.0
    # Their mean falls from 0.5 to 0.3, and the first of them alone never reaches 0.35.
    assert compare.seconds_to(group, 0.35) == pytest.approx(17.5)


# ---- the experiment


def test_a_run_is_new_begun_or_finished(tmp_path):
    folder = experiment.run_folder(tmp_path, "qgenx:bits=3", 2)
    assert folder.name == "qgenx-bits3-seed2" and experiment.state(folder) == "new"
    folder.mkdir()
    assert experiment.state(folder) == "new"
    checkpoint.save(folder, 3, {})
    assert experiment.state(folder) == "begun"
    (folder / "summary.json").write_text(json.dumps({"outcome": "Stopped"}))
    assert experiment.state(folder) == "begun"
    (folder / "summary.json").write_text(json.dumps({"outcome": "Finished"}))
    assert experiment.state(folder) == "finished"


def test_what_is_finished_is_left_alone_and_what_was_cut_off_goes_on(tmp_path):
    commands = []

    def launch(command):
        commands.append(command[2:])
        return 0

    folder = tmp_path / "run"
    folder.mkdir()
    experiment.one_run(launch, folder, ["--seed", "0"])
    assert commands.pop() == ["--out", str(folder), "--seed", "0"] and not folder.exists()
    folder.mkdir()
    checkpoint.save(folder, 3, {})
    experiment.one_run(launch, folder, ["--seed", "0"])
    assert commands.pop() == ["--resume", str(folder)]
    (folder / "summary.json").write_text(json.dumps({"outcome": "Finished"}))
    experiment.one_run(launch, folder, ["--seed", "0"])
    assert not commands


def test_hosts_and_rate_contradict(capsys):
    with pytest.raises(SystemExit):
        experiment.parse_flags(["--hosts", "a,b", "--rate", "1gbit"])
    assert "--rate makes hosts of its own" in capsys.readouterr().err


def test_points_of_the_search_are_settings_of_the_trainer():
    sys.path.insert(0, str(ROOT / "train"))
    settings = importlib.import_module("settings")
    sys.path.remove(str(ROOT / "train"))
    for point in quick_search.GRID:
        settings.parse_flags(
            "", [word for name, value in point.items() for word in (f"--{name.replace('_', '-')}", value)]
        )


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def tiny():
    """The tiny experiment, two compressions on two ranks; where Inception's weights can be had."""
    inception = importlib.import_module("inception")
    try:
        inception.fetch_weights()
    except inception.SourceError as error:
        pytest.skip(str(error))
    base = ROOT / "runs" / "experiment-tiny-2ranks"
    shutil.rmtree(base, ignore_errors=True)
    done = _run(
        "benchmarks/experiment.py", "--size", "tiny", "--ranks", "2", "--compressions", "none", "qgenx:bits=4"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    yield base
    shutil.rmtree(base)


@pytest.mark.slow
@pytest.mark.parallel
def test_the_experiment_ends_in_the_figure_and_begins_nothing_twice(tiny):
    text = (tiny / "figure.md").read_text()
    assert "| `none` | 1 | 4 |" in text and "| `qgenx:bits=4` | 1 | 4 |" in text
    assert "FID and KID of 6 samples against 6 training images." in text
    scores = [json.loads(line) for line in (tiny / "none-seed0" / "scores.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in scores] == [2, 4]
    with open(tiny / "figure.csv", newline="") as file:
        assert all(row["rate"] == "none" and row["commit"] and row["device"] for row in csv.DictReader(file))
    again = experiment.experiment(
        experiment.parse_flags(["--size", "tiny", "--ranks", "2", "--compressions", "none", "qgenx:bits=4"])
    )
    assert again == 0


@pytest.mark.slow
@pytest.mark.parallel
def test_score_repeats_the_score_of_the_run_on_another_number_of_ranks(tiny):
    run = tiny / "none-seed0"
    done = _run("train/score.py", str(run))
    assert done.returncode == 0, done.stderr
    last = json.loads((run / "scores.jsonl").read_text().splitlines()[-1])
    said = done.stdout.splitlines()[-1]
    assert said.startswith("iteration 4: FID ") and said.endswith("(6 samples against 6 training images)")
    assert float(said.split()[3].rstrip(",")) == pytest.approx(last["fid"], rel=1e-3)  # a pixel may round otherwise


@pytest.mark.slow
@pytest.mark.parallel
def test_sample_writes_a_grid_an_interpolation_and_single_pictures(tiny, tmp_path):
    run = tiny / "none-seed0"
    sample.main(sample.parse_flags([str(run), "--rows", "2"]))
    for name in ("grid", "interpolation"):
        with Image.open(run / f"{name}.png") as picture:
            assert picture.size == (8 * 32, 2 * 32)
    sample.main(sample.parse_flags([str(run), "--folder", str(tmp_path / "single"), "--count", "3"]))
    assert len(list((tmp_path / "single").glob("*.png"))) == 3


# ---- those who are told


def _log_records(data: bytes):
    """Of a file of Weights & Biases: after 7 bytes, LevelDB's log: blocks of 32 KiB, records cut at their ends."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or last piece
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="Weights & Biases is not installed")
def test_weights_and_biases_gets_the_metrics_without_a_network(tmp_path):
    from wandb.proto import wandb_internal_pb2

    flags = ["--iterations", "2", "--width", "4", "--batch", "6", "--log-every", "1", "--data", "digits"]
    done = _run(
        "train/wgan.py", *flags, "--out", str(tmp_path / "run"), "--wandb", "trial", "--wandb-mode", "offline"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    seen = []
    for data in _log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            seen.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [json.loads(row["loss_critic"]) for row in seen] == [row["loss_critic"] for row in written]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="Weights & Biases is installed")
def test_asking_for_weights_and_biases_without_it_is_one_sentence(tmp_path):
    done = _run("train/wgan.py", "--data", "digits", "--wandb", "trial", "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and "wgan.py: --wandb needs Weights & Biases: pip install wandb." in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_gets_the_metrics_where_it_is_installed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--iterations", "2", "--width", "4", "--batch", "6", "--log-every", "1", "--data", "digits"]
    assert _run("train/wgan.py", *flags, "--out", str(tmp_path / "run")).returncode == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = [event.value for event in events.Scalars("loss_critic")]
    assert shown == pytest.approx([row["loss_critic"] for row in written], rel=1e-6)  # float32 there
