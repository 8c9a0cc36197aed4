"""train/checkpoint.py: whole or not at all, two kept, broken ones passed over."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("horovod.torch", reason="the trainer runs on Horovod")
TRAIN = Path(__file__).resolve().parents[1] / "train"
sys.path.insert(0, str(TRAIN))
checkpoint = importlib.import_module("checkpoint")
sys.path.remove(str(TRAIN))


def test_the_last_two_are_kept_and_the_last_is_read(tmp_path):
    for moves in (1, 20, 3, 100):
        checkpoint.save(tmp_path, moves, {"value": torch.tensor(moves)})
    assert [path.name.split("-")[1] for path in checkpoint.saved(tmp_path)] == ["0000000020", "0000000100"]
    content, warnings = checkpoint.load_last(tmp_path)
    assert content["value"] == 100 and content["moves"] == 100 and not warnings


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_broken_last_one_falls_back_with_a_warning_that_names_it(tmp_path, damage):
    checkpoint.save(tmp_path, 1, {"value": 1})
    last = checkpoint.save(tmp_path, 2, {"value": 2})
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes({"cut": data[:-9], "changed": data, "empty": b""}[damage])
    content, (warning,) = checkpoint.load_last(tmp_path)
    assert content["value"] == 1
    assert warning == f"{last} is damaged: its content is not what its name says."


def test_a_full_disk_is_one_sentence_and_leaves_the_older_ones(tmp_path):
    before = checkpoint.save(tmp_path, 1, {"value": 1})
    os.symlink("/dev/full", tmp_path / "checkpoint.partial")
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be written to .* \(No space left on device\)\.$"):
        checkpoint.save(tmp_path, 2, {"value": torch.zeros(100_000)})
    assert [*tmp_path.iterdir()] == [before] and checkpoint.load(before)["value"] == 1


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [{"weights": torch.zeros(3)}, [1, 2], Foreign()])
def test_a_foreign_file_is_refused_and_nothing_in_it_is_executed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint"):
        checkpoint.load(tmp_path / "foreign.pt")
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_no_checkpoint_of_torch_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint that torch can read safely"):
        checkpoint.load(tmp_path / "text.pt")


def test_an_empty_folder_has_nothing_to_go_on_from(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="has no checkpoint to go on from"):
        checkpoint.load_last(tmp_path)
