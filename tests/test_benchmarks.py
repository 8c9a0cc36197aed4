"""The benchmarks run and write every row that they promise. Nothing is said about time: a busy machine is no error."""

import csv
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvd_qgenx

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FIGURES = ["bits", "encode", "decode_one", "decode_mean", "decode", "encode_two", "decode_two"]


@pytest.fixture
def codec_speed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("codec_speed")


@pytest.mark.slow
def test_codec_speed_writes_every_row(codec_speed, tmp_path):
    flags = ["--numel", "20000", "--rounds", "1", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "codec_speed.py", *flags], capture_output=True, text=True, check=True
    )
    with open(tmp_path / "codec_speed.csv", newline="") as file:
        rows = {(row["row"], row["figure"]): row for row in csv.DictReader(file)}
    absent = {row for row, module in codec_speed.NEEDS.items() if importlib.util.find_spec(module) is None}
    wanted = {(row, figure) for row in codec_speed.CODECS for figure in FIGURES} | {("memcpy", "two")}
    wanted |= {(row, figure) for row in codec_speed.OTHERS.keys() - {"two_calls"} for figure in ("encode", "decode")}
    wanted |= {("two_calls", "encode_two"), ("two_calls", "decode_two"), ("core", "slowness")}
    wanted |= {(row, figure) for row in codec_speed.PEERS.keys() - absent for figure in ("bits", "encode", "decode")}
    wanted |= {(row, f"over_entropy{more}") for row in codec_speed.OVERHEADS for more in ("", "_with_headers")}
    assert wanted <= set(rows)
    assert all(float(row["value"]) > 0 for name, row in rows.items() if name[0] not in ("memory", "memory_out"))
    assert done.stdout.endswith(codec_speed.table(tmp_path) + "\n")
    assert all(f"{codec_speed.NEEDS[row]} is not installed" in done.stdout for row in absent)
    assert (tmp_path / "codec_speed.png").exists()


def test_rows_name_the_version_where_there_is_no_checkout(codec_speed, monkeypatch, tmp_path):
    records = importlib.import_module("records")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.provenance()["commit"] == hvd_qgenx.__version__


def test_codec_speed_times_nothing_that_does_not_come_back(codec_speed):
    gradient = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    for codec in codec_speed.codecs(gradient).values():
        payloads = [codec.encode(gradient, codec_speed.key(rank)) for rank in range(3)]
        codec_speed.check(codec, gradient, payloads)
        with pytest.raises(SystemExit, match="nothing is timed"):
            codec_speed.check(codec, gradient, payloads[1:])  # other draws than the specification's
