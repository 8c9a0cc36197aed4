"""train/settings.py: presets, files and flags, and what a wrong one is told."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("horovod.torch", reason="the trainer runs on Horovod")
TRAIN = Path(__file__).resolve().parents[1] / "train"
sys.path.insert(0, str(TRAIN))
settings = importlib.import_module("settings")
sys.path.remove(str(TRAIN))


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        settings.parse_flags("", list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def config(folder: Path, text: str) -> list[str]:
    path = folder / "run.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = config(tmp_path, 'preset = "paper"\nlr_critic = 0.25\nwidth = 7\nautocast = true\n')
    flags = settings.parse_flags("", [*file, "--width", "9"])
    assert (flags.width, flags.lr_critic, flags.batch, flags.autocast) == (9, 0.25, 1024, True)
    assert flags.given == ["autocast", "lr_critic", "preset", "width"]


def test_a_flag_that_repeats_the_default_counts_as_given():
    assert settings.parse_flags("", ["--seed", "0"]).given == ["seed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_critc = 1", "unknown key 'lr_critc'; did you mean 'lr_critic'?"),
        ("batch = 0", "batch: '0' is not a whole number from 1 to 1048576"),
        ('optimizer = "sgd"', "optimizer: invalid choice: 'sgd'"),
        ("autocast = 3", "autocast must be true or false, got 3"),
        ("lr_critic = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(tmp_path, capsys, text, message):
    said = refused(capsys, *config(tmp_path, text))
    assert message in said and "run.toml" in said


def test_a_file_that_is_missing_is_named(capsys):
    assert "nowhere.toml" in refused(capsys, "--config", "nowhere.toml")


def test_compression_takes_what_compression_qgenx_takes():
    choice = settings.compression("qgenx:bits=3,rate_weight=0.02,adapt_at=0+5,coder=elias_gamma")
    made = choice.make(4).settings
    assert (made.bits, made.rate_weight, made.adapt_at, made.coder, made.seed) == (3, 0.02, (0, 5), "elias_gamma", 4)
    fixed = settings.compression("fixed4:bucket_size=512").make(0).settings
    assert (fixed.bits, fixed.norm, fixed.coder, fixed.bucket_size) == (4, "linf", "fixed", 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "invalid choice: 'zip'"),
        ("qgenxx", "did you mean 'qgenx'?"),
        ("qgenx:bit=3", "qgenx has no option 'bit=3'; did you mean 'bits'?"),
        ("qgenx:bits", "qgenx has no option 'bits'"),
        ("fp16:bits=3", "fp16 has no option 'bits=3'"),
        ("qgenx:bits=99", "bits must be"),
        ("qgenx:seed=1", "qgenx has no option 'seed=1'"),
    ],
)
def test_a_wrong_compression_says_what_is_wrong(capsys, text, message):
    assert message in refused(capsys, "--compression", text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--critic-steps", "2"], "--critic-steps is for --optimizer adam"),
        (["--lookahead", "5", "--optimizer", "qgenx"], "--lookahead is not for --optimizer qgenx"),
        (["--resume", "x", "--out", "y"], "--resume goes on in its own folder: leave --out away"),
        (["--score-samples", "2"], "'2' is not a whole number from 3"),
        (["--average", "1"], "'1' is not a number from 0 up to, not including, 1"),
    ],
)
def test_flags_that_contradict_are_refused(capsys, flags, message):
    assert message in refused(capsys, *flags)


def test_horovodrun_takes_no_flag_of_the_trainer_for_several_of_its_own():
    """Its parser looks at all words, also behind the command, and ends where one abbreviates two of its options."""
    launch = pytest.importorskip("horovod.runner.launch")
    helped = subprocess.run(
        [sys.executable, "-c", f"from {launch.__name__} import parse_args; parse_args()", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    theirs = set(re.findall(r"--[a-z][a-z-]*", helped))
    ours = {
        word for action in settings.parser_of("")._actions for word in action.option_strings if word.startswith("--")
    }
    assert "--network-interface" in theirs and "--model" in ours
    ambiguous = {word for word in ours - theirs if sum(other.startswith(word) for other in theirs) > 1}
    assert not ambiguous
