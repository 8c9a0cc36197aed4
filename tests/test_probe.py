"""What a probe says, and how it is called; tests/parallel/check_probe.py measures."""

import csv
import dataclasses
import subprocess
import sys
from itertools import permutations

import pytest
import torch

import hvd_qgenx
from hvd_qgenx.exchange.cost import Line, Network
from hvd_qgenx.probe import NUMEL, ProbeResult, Row, _affordable, _cut, _function, _sizes, _ways


def _row(compression, bits, ms, plan="allgather", variance=0.0, parts=1, measured=1000):
    return Row(
        compression,
        bits,
        plan,
        parts,
        ms,
        ms - 1,
        ms + 1,
        5,
        4000,
        8000,
        variance,
        "wire",
        2.0,
        3.0,
        4.0,
        5.0,
        measured,
    )


def _result(*rows):
    line = Line(0.001, 1e-8)
    return ProbeResult(3, 2, 1000, 4, Network(3, line, line, line, line), rows)


NONE, FP16 = _row("none", 0, 100.0, "allreduce"), _row("fp16", 0, 60.0, "allreduce")
FOUR, TWO = _row("qgenx", 4, 20.0, "two_phase", 0.04, 2, 500), _row("qgenx", 2, 5.0, variance=25.0)


def test_the_fastest_is_advised_unless_its_rounding_adds_more_than_there_is():
    assert _result(NONE, FP16, FOUR, TWO).best == FOUR
    assert _result(NONE, FP16, TWO).best == FP16
    assert _result(NONE, TWO).best == NONE


def test_of_equally_fast_ways_the_most_exact_is_advised():
    almost = dataclasses.replace(FOUR, ms=58.0)
    assert _result(NONE, FP16, almost).best == FP16  # 3.4 % slower
    assert _result(NONE, FP16, dataclasses.replace(FOUR, ms=57.0)).best.compression == "qgenx"  # 5.3 %


def test_the_table_has_a_line_for_each_way_and_says_what_to_use():
    lines = str(_result(NONE, FP16, FOUR, TWO)).split("\n")
    assert lines[0] == "1,000 coordinates in 4 tensors, 3 ranks of 2 threads; 1 ms a message, 200 MB/s a link"
    heads = "compression plan ms p10 to p90 bytes a rank bytes a link variance bound by"
    assert " ".join(lines[1].split()) == heads
    assert [line.split("  ")[0] for line in lines[2:6]] == ["float32", "fp16", "qgenx 4 bits", "qgenx ternary"]
    assert "two_phase in 2 parts  ~20    19 to 21" in lines[4] and "~" not in lines[3]
    assert lines[6:] == [
        "~ fewer coordinates were exchanged, and times scaled",
        "Use Compression.qgenx(bits=4) by two_phase in 2 parts: 20 ms, 5 times as fast as float32.",
    ]


def test_none_is_advised_in_so_many_words():
    assert str(_result(NONE, TWO)).endswith("\nUse Compression.none: 100 ms.")


def test_the_csv_has_all_of_every_row(tmp_path):
    result = _result(NONE, FOUR)
    result.to_csv(tmp_path / "probe.csv")
    with open(tmp_path / "probe.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {field.name for field in dataclasses.fields(Row)}
    assert all(set(row) == names | {"ranks", "threads", "numel", "tensors", "best"} for row in rows)
    assert [(row["compression"], row["ms"], row["best"]) for row in rows] == [
        ("none", "100", "0"),
        ("qgenx", "20", "1"),
    ]


def test_sizes_are_those_of_a_number_a_list_or_a_model():
    model = torch.nn.Linear(3, 5)
    model.bias.requires_grad_(False)
    assert _sizes(None, None, None) == (NUMEL,)
    assert _sizes(7, None, None) == (7,)
    assert _sizes(None, [3, 1], None) == (3, 1)
    assert _sizes(None, None, model) == (15,)


MODELS = "import torch\n\n\ndef small():\n    return torch.nn.Linear(3, 5)\n\n\ndef nothing():\n    return 7\n"


def test_a_model_is_made_by_name_and_takes_no_memory(tmp_path, monkeypatch):
    (tmp_path / "probed").mkdir()
    (tmp_path / "probed" / "__init__.py").write_text(MODELS)
    (tmp_path / "probed" / "models.py").write_text(MODELS.replace("small", "deeper"))
    monkeypatch.syspath_prepend(tmp_path)
    assert _sizes(None, None, "probed:small") == (15, 5)
    assert _function("probed:deeper").__module__ == "probed.models"
    for wrong, why in {
        "probed:nothing": "that makes one, got 7",
        "probed:absent": "there is no such function",
        "probed": "there is no such function",
        "absent_package:small": "No module named 'absent_package'",
        ":small": "Empty module name",
    }.items():
        with pytest.raises(ValueError, match=f"^model must be .*{why}"):
            _sizes(None, None, wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numel": 0}, "numel must be an integer at least 1"),
        ({"sizes": [3, 0]}, "sizes must be an integer at least 1"),
        ({"sizes": []}, "model must have parameters"),
        ({"numel": 3, "sizes": [3]}, "exclude each other"),
        ({"model": 5}, "model must be a torch.nn.Module or 'package:function'"),
        ({"numel": 3, "repeats": 2}, "repeats must be an integer at least 3"),
        ({"numel": 3, "seconds": 0}, "seconds must be a positive number"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        hvd_qgenx.probe(**arguments)


def test_vectors_are_cut_to_what_time_allows():
    assert _cut([5, 3, 4], 12) == [5, 3, 4]
    assert _cut([5, 3, 4], 7) == [5, 2]
    assert _cut([5, 3, 4], 5) == [5]
    assert _affordable(10**7, 1.5) == 10**7
    assert _affordable(10**7, 0.25) == 2_500_000
    assert _affordable(10**7, 1e-9) == 2**17
    assert _affordable(1000, 1e-9) == 1000


def test_ways_go_from_exact_to_coarse_and_two_phases_need_three_ranks():
    ways = [(way.compression, way.bits, way.plan) for way in _ways(3)]
    assert ways[:2] == [("none", 0, "allreduce"), ("fp16", 0, "allreduce")]
    assert ways[2:] == [("qgenx", bits, plan) for bits in (8, 4, 3, 2) for plan in ("allgather", "two_phase")]
    assert [way for way in ways if way[2] != "two_phase"] == [tuple(way) for way in _ways(2)]


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


USES = {
    "as a function": "import hvd_qgenx; assert callable(hvd_qgenx.probe) and hvd_qgenx.probe.__name__ == 'probe'",
    "as a room": "from hvd_qgenx.probe import ProbeResult; import hvd_qgenx.probe; import hvd_qgenx.probe.__main__",
    "as a program": (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    runpy.run_module('hvd_qgenx.probe', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert end.code == 0"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", [*permutations(USES)], ids=", then ".join)
def test_the_function_and_the_program_of_one_name_do_not_hinder_each_other(order):
    done = _python("\n".join([*(USES[use] for use in order), USES["as a function"]]))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_program_warns_of_nothing_and_says_what_it_needs():
    command = [sys.executable, "-W", "error", "-m", "hvd_qgenx.probe"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stderr == "" and "--model" in shown.stdout
    alone = subprocess.run([*command[:1], *command[3:], "--numel", "5"], capture_output=True, text=True)
    assert alone.returncode == 1
    assert alone.stderr.splitlines()[-1] == (
        "probe: a probe needs at least two ranks: start it under horovodrun -np 2 or more"
    )


@pytest.mark.slow
def test_without_horovod_the_probe_says_how_to_get_it():
    code = "import sys; sys.modules['horovod'] = None\nimport hvd_qgenx\nhvd_qgenx.probe(numel=5)"
    done = _python(code)
    assert done.returncode == 1 and "needs Horovod with PyTorch: pip install" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_before_horovod_is_initialized_the_probe_says_what_to_call():
    done = _python("import hvd_qgenx\nhvd_qgenx.probe(numel=5)")
    assert done.stderr.splitlines()[-1] == ("RuntimeError: Horovod is not initialized: call horovod.torch.init() first")
