"""What a run can be told: presets, a TOML file, flags, in this order; and what --compression means.

A later one wins: a flag over the file, the file over the preset. A key or an option that does not exist is an error
that says which one was meant.
"""

import argparse
import ast
import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib  # type: ignore[no-redef]

import torch
from data import CHOICES
from job import MOST_SEED, fraction, positive, weight, whole
from methods import METHODS
from networks import NETWORKS

import hvd_qgenx

PRESETS = {
    # Small enough for a laptop: colours and rough shapes instead of noise. benchmarks/quick_search.py looks around it.
    "quick": {
        "model": "dcgan",
        "iterations": 3000,
        "minutes": 3.5,
        "width": 24,
        "latent": 64,
        "batch": 48,
        "lr_generator": 2e-4,
        "lr_critic": 2e-3,
        "beta1": 0.5,
        "drift": 1e-3,
        "average": 0.97,
        "log_every": 5,
        "sample_every": 100,
        "score_every": 0,
        "score_samples": 256,
        "reference": 1000,
        "checkpoint_every": 50,
    },
    # For one GPU, or a night.
    "small": {
        "model": "resnet",
        "iterations": 50_000,
        "minutes": None,
        "width": 64,
        "latent": 128,
        "batch": 192,
        "lr_generator": 1e-4,
        "lr_critic": 5e-4,
        "beta1": 0.5,
        "drift": 1e-3,
        "average": 0.999,
        "log_every": 50,
        "sample_every": 1000,
        "score_every": 5000,
        "score_samples": 10_000,
        "reference": 50_000,
        "checkpoint_every": 500,
    },
    # The settings of the Q-GenX experiment: with three ranks, 341 images on each.
    "paper": {
        "model": "resnet",
        "iterations": 500_000,
        "minutes": None,
        "width": 128,
        "latent": 128,
        "batch": 1024,
        "lr_generator": 5e-5,
        "lr_critic": 5e-4,
        "beta1": 0.5,
        "drift": 0.0,
        "average": 0.9999,
        "log_every": 100,
        "sample_every": 5000,
        "score_every": 10_000,
        "score_samples": 50_000,
        "reference": 50_000,
        "checkpoint_every": 1000,
    },
}
#: What a run that goes on may be told anew; all else stays as it began.
CHANGEABLE = {
    "iterations", "minutes", "log_every", "sample_every", "score_every", "score_samples", "reference",
    "checkpoint_every", "check_replicas", "device", "threads", "profile", "trace", "wandb", "wandb_mode", "resume",
    "out",
}  # fmt: skip


# ---- compression -------------------------------------------------------------------------------------------------

FIXED = {"levels": "uniform", "coder": "fixed", "norm": "linf"}
#: Those that are Compression.qgenx, and what of it they choose.
CODED = {"qgenx": {"bits": 4}, "fixed8": {"bits": 8, **FIXED}, "fixed4": {"bits": 4, **FIXED}}
COMPRESSIONS = ("none", "fp16", *CODED, "auto")
NOT_OPTIONS = {"named_parameters", "process_set", "seed"}  # the run's own


class Choice(NamedTuple):
    """--compression, taken apart: "qgenx:bits=3" is ("qgenx:bits=3", "qgenx", {"bits": 3})."""

    text: str
    name: str
    options: dict

    def make(self, seed: int):
        """A compressor of its own for every optimizer."""
        if self.name in CODED:
            return hvd_qgenx.Compression.qgenx(**{**CODED[self.name], **self.options}, seed=seed)
        return getattr(hvd_qgenx.Compression, self.name)


def compression(text: str) -> Choice:
    """Reads NAME or NAME:OPTION=VALUE,OPTION=VALUE; several values of one option are joined by +."""
    name, _, rest = text.partition(":")
    if name not in COMPRESSIONS:
        raise argparse.ArgumentTypeError(
            f"invalid choice: {name!r} (choose from {', '.join(COMPRESSIONS)}){meant(name, COMPRESSIONS)}"
        )
    choice = Choice(text, name, dict(_option(name, each) for each in rest.split(",") if rest))
    try:
        choice.make(0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return choice


def _option(name: str, text: str) -> tuple[str, object]:
    allowed = set(inspect.signature(hvd_qgenx.Compression.qgenx.__call__).parameters) - NOT_OPTIONS
    key, equals, value = text.partition("=")
    if name not in CODED or key not in allowed or not equals:
        wanted = meant(key, allowed) if name in CODED else ""
        raise argparse.ArgumentTypeError(f"{name} has no option {text!r}{wanted}")
    return key, tuple(map(_value, value.split("+"))) if "+" in value or key == "adapt_at" else _value(value)


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---- flags -------------------------------------------------------------------------------------------------------


def parser_of(usage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wgan.py",
        usage="wgan.py [--flag value ...]; --help lists the flags",
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="defaults of the flags below it (quick)")
    add("--config", type=Path, metavar="FILE", help="TOML file of flags by name, as lr_critic = 1e-3")
    add("--iterations", type=whole(1), help="of two exchanges each under extra-gradient")
    add("--minutes", type=positive, help="training ends at the first logged iteration after so long (paper: never)")
    add("--model", choices=NETWORKS, help="the kind of both networks")
    add("--width", type=whole(1, 4096), help="channels of both networks; of dcgan, those of its narrowest layers")
    add("--latent", type=whole(1, 2**16), help="size of the generator's noise vector")
    add("--batch", type=whole(1, 2**20), help="images per gradient of all ranks together")
    add("--optimizer", choices=METHODS, default="extra_adam", help="(extra_adam)")
    add("--critic-steps", type=whole(1), default=1, metavar="N", help="under adam: before each of the generator's (1)")
    add("--lookahead", type=whole(0), default=0, metavar="N",
        help="every N iterations players go half way back to where they were before them (0: never)")  # fmt: skip
    add("--lr-generator", type=positive, help="learning rate of the generator")
    add("--lr-critic", type=positive, help="learning rate of the critic")
    add("--beta1", type=fraction, help="Adam's memory of gradients")
    add("--step-scale", type=positive, default=1e-3, help="under qgenx: in place of learning rates (1e-3)")
    add("--penalty", type=positive, default=10.0, help="weight of the gradient penalty (10)")
    add("--drift", type=weight, help="weight of the critic's mean square on real images, which keeps it near 0")
    add("--average", type=fraction, help="decay of the generator's moving average, which is sampled and scored")
    add("--compression", type=compression, default="qgenx", metavar="NAME[:OPTION=VALUE,...]",
        help=f"what travels: {', '.join(COMPRESSIONS)}; options of Compression.qgenx (qgenx)")  # fmt: skip
    add("--exchange", choices=("auto", "allgather", "two_phase"), default="auto", help="plan of coded exchanges (auto)")
    add("--data", choices=CHOICES, default="auto", help="source of the images (auto: the first that can be had)")
    add("--seed", type=whole(0, MOST_SEED), default=0, help="of weights, shards, noise and rounding (0)")
    add("--log-every", type=whole(1), metavar="N", help="iterations between two lines of metrics.jsonl")
    add("--sample-every", type=whole(1), metavar="N", help="iterations between two samples_*.png")
    add("--score-every", type=whole(0), metavar="N", help="iterations between FID and KID, and at the end; 0: never")
    add("--score-samples", type=whole(3), metavar="N", help="images that are generated for a score")
    add("--reference", type=whole(3), metavar="N", help="training images that they are compared with")
    add("--checkpoint-every", type=whole(1), metavar="N", help="iterations between two checkpoints; the last two stay")
    add("--check-replicas", type=whole(0), default=0, metavar="N",
        help="compare a hash of all parameters of all ranks every N iterations and at the end (0: never)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=whole(1), help="of each rank on the CPU (the host's cores, shared by its ranks)")
    add("--autocast", action="store_true", help="both losses in bfloat16 where torch's autocast says so")
    add("--profile", action="store_true", help="wait for the GPU around each part, so that its time is its own")
    add("--trace", type=whole(0), default=0, metavar="N", help="N iterations as a Chrome trace in trace.json")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--wandb-mode", choices=("online", "offline"), default="online")
    add("--out", type=Path, help="folder of the run (runs/<time>-<compression>)")
    add("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder, from its last checkpoint")
    return parser


def parse_flags(usage: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """A run's settings. Those given, by a flag or in the file, are named in ``given``."""
    parser = parser_of(usage)
    chosen = parser.parse_args(arguments)
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    try:
        file = read_config(chosen.config, known) if chosen.config else {}
    except ConfigError as error:
        parser.error(str(error))
    given = {key for key in known if _is_given(parser, key, arguments)}
    preset = chosen.preset if "preset" in given else file.get("preset", chosen.preset)
    parser.set_defaults(**{**PRESETS[preset], **file, "preset": preset})
    flags = parser.parse_args(arguments)
    flags.given = sorted(given | set(file))
    _check(parser, flags)
    return flags


def _is_given(parser: argparse.ArgumentParser, key: str, arguments) -> bool:
    marker = object()
    saved = parser.get_default(key)
    parser.set_defaults(**{key: marker})
    found = getattr(parser.parse_args(arguments), key) is not marker
    parser.set_defaults(**{key: saved})
    return found


def _check(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if flags.resume and flags.out:
        parser.error("--resume goes on in its own folder: leave --out away")
    if flags.critic_steps > 1 and flags.optimizer != "adam":
        parser.error("--critic-steps is for --optimizer adam: the others move both players at once")
    if flags.lookahead and flags.optimizer == "qgenx":
        parser.error("--lookahead is not for --optimizer qgenx, whose points are sums of all its gradients")


# ---- the file ----------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A config file that cannot be used; one sentence."""


def read_config(path: Path, known: dict[str, argparse.Action]) -> dict:
    """The file's values, each checked as the flag of its name would be."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    for key in values:
        if key not in known:
            raise ConfigError(f"--config {path}: unknown key {key!r}{meant(key, known)}")
    return {key: _checked(path, key, value, known[key]) for key, value in values.items()}


def _checked(path: Path, key: str, value, action: argparse.Action):
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"--config {path}: {key} must be true or false, got {value!r}")
        return value
    convert: Callable = action.type if callable(action.type) else str
    try:
        found = convert(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ConfigError(f"--config {path}: {key}: {error}") from None
    if action.choices is not None and found not in action.choices:
        raise ConfigError(
            f"--config {path}: {key}: invalid choice: {value!r} (choose from {', '.join(action.choices)})"
        )
    return found


def meant(word: str, known) -> str:
    """'; did you mean ...?' of the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
