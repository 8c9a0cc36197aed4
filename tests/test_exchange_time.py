"""benchmarks/exchange_time.py writes the rows that it promises, and its arithmetic is that of the plans.

Nothing is said about speed, which a busy machine has not; but no link can be faster than its rate.
"""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


shapes, exchange_time, exchange_table, lab = map(load, ("shapes", "exchange_time", "exchange_table", "laboratory"))


# ---- models ----------------------------------------------------------------------------------------------------------


def test_resnet50_has_torchvision_s_parameters():
    """The counts are those of torchvision's documentation; the shapes those of He et al. (2016), table 1."""
    found = shapes.shapes_of("resnet50")
    assert len(found) == 161 and shapes.count(found) == 25_557_032
    assert list(found)[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"]
    assert found["layer1.0.downsample.0.weight"] == (256, 64, 1, 1) and "layer1.1.downsample.0.weight" not in found
    assert found["layer4.2.conv2.weight"] == (512, 512, 3, 3) and found["fc.weight"] == (1000, 2048)


def test_the_wgan_is_that_of_the_trainer():
    assert shapes.count(shapes.shapes_of("wgan:128")) == 1_548_547 + 1_053_825


def test_plain_lists_are_what_their_names_say():
    assert shapes.shapes_of("vector:7") == {"vector": (7,)}
    assert shapes.shapes_of("equal:2x5") == {"part0": (5,), "part1": (5,)}


@pytest.mark.parametrize("model", ["", "resnet", "vector", "vector:", "vector:x", "equal:3", "resnet50:2"])
def test_a_model_that_is_none_is_refused_in_one_sentence(model):
    with pytest.raises(SystemExit, match="model must be wgan:WIDTH, resnet50, vector:N, matrix:NxM or equal:COUNTxN"):
        shapes.shapes_of(model)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def report(handed, codec=(), numel=1000):
    steps = {"milliseconds": [8.0, 4.0, 6.0], "cpu": [3.0, 1.0, 2.0], "on_link": [5.0, 5.0, 6.0]}
    base = {**steps, "label": exchange_time.BASE, "codec": [], "handed": {"allreduce": 4 * numel}}
    other = {**steps, "label": "wrapper_4/allgather", "codec": list(codec), "handed": handed, "milliseconds": [3.0]}
    return {"numel": numel, "num_parameters": 2, "results": [base, other]}


@pytest.mark.parametrize(
    ("handed", "link_bytes"),
    [
        ({"allreduce": 3000}, 4000),  # 2 (K - 1) / K
        ({"allgather": 3000}, 6000),  # K - 1
        ({"alltoall": 3000, "allgather": 900}, 2000 + 1800),  # (K - 1) / K, then every shard to all others
    ],
)
def test_bytes_on_a_link_follow_from_the_plan(handed, link_bytes):
    cell = exchange_time.Cell("1mbit", 3, "vector:1000", "step")
    base, row = exchange_time.rows_of(cell, report(handed))
    assert row["link_bytes"] == link_bytes and float(row["wire_ms"]) == 8 * link_bytes / 1e6 * 1e3
    # float32 moves 2 (K - 1) / K of 4,000 bytes, fp16 half of that.
    assert float(base["wire_ms"]) == 42.67 and float(row["fp16_wire_ms"]) == 21.33
    assert row["bytes_sent"] == sum(handed.values()) and row["link_bytes_measured"] == 5


def test_ratios_are_those_of_medians_in_the_same_job():
    cell = exchange_time.Cell("loopback", 2, "vector:1000", "step")
    base, row = exchange_time.rows_of(cell, report({"allgather": 500}, codec=[0.25, 0.75, 0.5]))
    assert (base["ms_median"], base["ms_p10"], base["ms_p90"]) == ("6", "4.4", "7.6")
    assert base["float32_over_this"] == "1" and row["float32_over_this"] == "2"
    assert row["cpu_over_codec"] == "4" and row["bits_per_coordinate"] == "4"
    assert row["cpu_beyond_codec_us_per_parameter"] == "750"  # (2 - 0.5) ms over 2 parameters
    assert row["wire_ms"] == "" == row["this_over_wire"], "loopback has no rate"
    assert set(row) | {"commit", "date", "device"} == set(exchange_time.COLUMNS)


def test_methods_that_memory_cannot_hold_at_once_run_in_groups_that_all_have_what_they_are_compared_with():
    base = exchange_time.BASE
    assert exchange_time.split([base, "a", "b", "c"], room=9) == [[base, "a", "b", "c"]]
    assert exchange_time.split([base, "a", "b", "c"], room=3) == [[base, "a", "b"], [base, "c"]]
    assert exchange_time.split([base, "a"], room=1) == [] == exchange_time.split([base], room=0)
    assert exchange_time.split([base], room=1) == [[base]]


def test_a_mean_that_is_not_the_mean_is_not_timed():
    rank = load("exchange_rank")
    mean = [torch.randn(10_000, generator=torch.Generator().manual_seed(1))]
    p = torch.nn.Parameter(torch.zeros(10_000))
    contender = SimpleNamespace(parameters=[("p", p)], method=SimpleNamespace(label="wrong"))
    p.grad = mean[0].clone()
    rank.check(contender, mean)
    for wrong in (3 * mean[0], mean[0] / 3, torch.zeros(10_000), mean[0].flip(0), torch.full((10_000,), torch.nan)):
        p.grad = wrong
        with pytest.raises(SystemExit, match="wrong does not give the mean gradient: nothing is timed"):
            rank.check(contender, mean)


def test_the_table_has_the_newest_row_of_every_method_and_what_eight_hosts_cost_over_three(tmp_path):
    written = []
    for hosts, factor in ((3, 1), (8, 1), (8, 2)):  # the last is newer than the second
        found = report({"allgather": 500}, codec=[0.5])
        found["results"][1]["milliseconds"] = [3.0 * factor * hosts]
        rows = exchange_time.rows_of(exchange_time.Cell("1mbit", hosts, "vector:1000", "step"), found)
        written += [{"commit": "c", "date": "d", "device": "CPU x86_64, 2 cores", **row} for row in rows]
    exchange_time.append(tmp_path / "exchange_time.csv", exchange_time.COLUMNS, written)
    table = exchange_table.table(exchange_table.newest(tmp_path))
    assert table.count("| wrapper_4 | allgather | 48 (48 to 48) |") == 1 and "| 24 (24 to 24) |" not in table
    assert "3 hosts, links of 1mbit; timed: step. The hosts share 2 cores, so codec time counts" in table
    assert "256 KiB" in table, "500 bytes a host and 9 ms are faster than 1 Mbit/s"
    assert table.endswith("| 1mbit | vector:1000 | step | wrapper_4 | allgather | 9 | 48 | 5.33 |")


# ---- whole runs ------------------------------------------------------------------------------------------------------


def run(folder, *flags):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "exchange_time.py"), "--results", str(folder), "--rounds", "2", *flags],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(folder / "exchange_time.csv", newline="") as file:
        return {(row["mode"], f"{row['method']}/{row['plan']}"): row for row in csv.DictReader(file)}, done.stdout


@pytest.mark.parallel
@pytest.mark.slow
def test_every_method_has_a_row_or_a_sentence_that_says_why_not(tmp_path):
    rows, said = run(tmp_path, "--rates", "loopback", "--hosts", "2", "--models", "equal:2x3000")
    methods = load("exchange_methods").methods()
    for label, method in methods.items():
        for mode in exchange_time.MODES:
            hooks = mode == "step" and method.by_hooks and not label.startswith("stock")
            assert ((mode, label) in rows) != (hooks or f"{label} is left out: " in said)
    assert all(row["samples"] == "4" and float(row["ms_median"]) > 0 for row in rows.values())
    bits = {label: float(row["bits_per_coordinate"]) for (mode, label), row in rows.items() if mode == "backward"}
    assert bits["stock_float32/allreduce"] == 32 and bits["stock_fp16/allreduce"] == 16
    assert bits["int8/allgather"] == pytest.approx(8 + 32 / 3000, rel=1e-3)  # four digits are written
    assert bits["wrapper_8/allgather"] > bits["wrapper_4/allgather"] > bits["wrapper_ternary/allgather"] > 0
    assert {label for (_, label), row in rows.items() if row["codec_ms"]} == {
        k for k in methods if methods[k].coded
    } & {label for _, label in rows}


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.skipif(lab.obstacle() is not None, reason=str(lab.obstacle()))
def test_no_exchange_is_faster_than_its_link_and_the_link_carries_what_the_plan_says(tmp_path):
    flags = ["--rates", "50mbit", "--hosts", "2", "--models", "vector:500000", "--modes", "step"]
    rows, _ = run(tmp_path, *flags, "--methods", "stock_fp16", "wrapper_8/allgather")
    assert len(rows) == 3
    for row in rows.values():
        # The bucket lets 256 KiB through at once, in each direction of one link after the other.
        rest = (int(row["link_bytes"]) - 2 * 256 * 1024) * 8e3 / 50e6
        assert float(row["ms_p10"]) >= rest
        # Headers are 4.6 % of a full packet; coordination and acknowledgements take the rest.
        assert 1.0 <= int(row["link_bytes_measured"]) / int(row["link_bytes"]) <= 1.25
    assert (tmp_path / "exchange_time_step.png").exists() and (tmp_path / "exchange_time_step_wire.png").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stop being root")
def test_without_root_it_says_what_the_laboratory_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exchange_time.py", "--results", str(tmp_path)])
    os.seteuid(65534)
    try:
        with pytest.raises(SystemExit, match="the laboratory needs root"):
            exchange_time.main()
    finally:
        os.seteuid(0)
