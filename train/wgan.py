"""WGAN-GP on CIFAR-10 by distributed extra-gradient, with compressed gradient exchange. One readable script.

On one machine, 3 processes, about 4 minutes on 2 cores:
    horovodrun -np 3 python train/wgan.py
    horovodrun -np 3 python train/wgan.py --compression none         # or fp16, fixed8, fixed4, qgenx
By torchrun, without Horovod, it is the same run:
    torchrun --nproc-per-node 3 train/wgan.py
The full experiment on three machines that can reach each other by ssh:
    horovodrun -np 3 -H node1:1,node2:1,node3:1 python train/wgan.py --preset paper --device cuda

One iteration moves both players at once, x = (generator, critic), each with its own learning rate:
    x_{t+1/2} = x_t - step(mean over ranks of Q(g_k(x_t)))             exchange 1, opt.extrapolation()
    x_{t+1}   = x_t - step(mean over ranks of Q(g_k(x_{t+1/2})))       exchange 2, opt.step()
where g_k is the gradient of (generator_loss, critic_loss) on rank k's own images and noise, new in each half-step.

A run's folder holds config.json, metrics.jsonl (one object per logged iteration), samples_*.png, curves.png,
weights.pt and summary.json. Ctrl-C ends all ranks, keeps what there is, and counts as a clean end (exit code 0).
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import launch
import numpy as np
import torch
from data import CHOICES, SourceError, load_images, minibatches
from job import (
    MOST_SEED,
    TrainingError,
    check_replicas,
    fraction,
    open_folder,
    positive,
    progress_bar,
    random_stream,
    run,
    whole,
)
from models import Critic, Generator, count_parameters, critic_loss, generator_loss
from pictures import save_curves, save_grid
from torch import nn

import hvd_qgenx

PRESETS = {
    # Small enough for a laptop: colours and rough shapes instead of noise.
    "quick": {
        "iterations": 500,
        "minutes": 3.5,
        "width": 12,
        "latent": 64,
        "batch": 24,
        "lr_generator": 3e-4,
        "lr_critic": 2e-3,
        "average": 0.8,
        "log_every": 5,
        "sample_every": 50,
    },
    # The settings of the Q-GenX experiment: with three ranks, 341 images on each.
    "paper": {
        "iterations": 500_000,
        "minutes": None,
        "width": 128,
        "latent": 128,
        "batch": 1024,
        "lr_generator": 5e-5,
        "lr_critic": 5e-4,
        "average": 0.9999,
        "log_every": 100,
        "sample_every": 5000,
    },
}
COMPRESSIONS = {
    "none": lambda seed: hvd_qgenx.Compression.none,
    "fp16": lambda seed: hvd_qgenx.Compression.fp16,
    "fixed8": lambda seed: fixed_width(8, seed),
    "fixed4": lambda seed: fixed_width(4, seed),
    "qgenx": lambda seed: hvd_qgenx.Compression.qgenx(bits=4, seed=seed),  # adaptive levels, Huffman code
}
BETAS = (0.5, 0.9)
SAMPLES = 64


def fixed_width(bits: int, seed: int):
    """Uniform levels, `bits` bits for every coordinate."""
    return hvd_qgenx.Compression.qgenx(bits=bits, levels="uniform", coder="fixed", norm="linf", seed=seed)


# ---- flags -------------------------------------------------------------------------------------------------------


def parse_flags() -> argparse.Namespace:
    """A preset's values are the defaults of the other flags."""
    parser = argparse.ArgumentParser(
        usage="wgan.py [--flag value ...]; --help lists the flags",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="defaults of the flags below it (quick)")
    add("--iterations", type=whole(1), help="extra-gradient iterations, of two exchanges each")
    add("--minutes", type=positive, help="training ends at the first logged iteration after so long (paper: never)")
    add("--width", type=whole(1, 4096), help="channels of both networks")
    add("--batch", type=whole(1, 2**20), help="images per half-step of all ranks together")
    add("--lr-generator", type=positive, help="learning rate of the generator")
    add("--lr-critic", type=positive, help="learning rate of the critic")
    add("--average", type=fraction, help="decay of the generator's moving average, which draws the samples")
    add("--log-every", type=whole(1), metavar="N", help="iterations between two lines of metrics.jsonl")
    add("--sample-every", type=whole(1), metavar="N", help="iterations between two samples_*.png")
    add("--compression", choices=COMPRESSIONS, default="qgenx", help="what travels between the ranks (qgenx)")
    add("--data", choices=CHOICES, default="auto", help="source of the images (auto: the first that can be had)")
    add("--latent", type=whole(1, 2**16), help="size of the generator's noise vector")
    add("--penalty", type=positive, default=10.0, help="weight of the gradient penalty (10)")
    add("--seed", type=whole(0, MOST_SEED), default=0, help="of weights, shards, noise and rounding (0)")
    add(
        "--check-replicas",
        type=whole(0),
        default=0,
        metavar="N",
        help="compare a hash of all parameters of all ranks every N iterations and at the end (0: never)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--out", type=Path, help="folder of the run (runs/<time>-<compression>)")
    parser.set_defaults(**PRESETS[parser.parse_args().preset])
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return flags


# ---- what rank 0 writes ------------------------------------------------------------------------------------------


class Log:
    """The run's folder and the progress bar. On other ranks than 0 it does nothing."""

    def __init__(self, flags: argparse.Namespace, config: dict):
        self.folder = flags.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{flags.compression}"
        self.active = launch.rank() == 0
        self.last = {"iteration": 0, "seconds": 0.0}
        self.start = time.monotonic()
        open_folder(self.folder, config)
        self.metrics = self.folder / "metrics.jsonl"
        self.bar = progress_bar(flags.iterations)

    def row(self, row: dict) -> None:
        if not self.active:
            return
        self.last = row
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.set_postfix_str(
            f"generator {row['loss_generator']:.2f} critic {row['loss_critic']:.2f} "
            f"{row['bits_per_coordinate']:.2f} bits/coordinate "
            f"{row['bytes_sent'] / 1e6:.1f} MB of {row['bytes_float32'] / 1e6:.1f} MB float32",
            refresh=False,
        )

    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 3)

    def finish(self, outcome: str, communication) -> None:
        """Writes summary.json and prints the summary as the last line.

        The file comes first: on Ctrl-C, Open MPI's mpirun no longer shows what the ranks print.
        """
        if not self.active:
            return
        self.bar.close()
        done, seconds = self.bar.n, self.seconds()
        summary = {**self.last, "outcome": outcome, "iteration": done, "seconds": seconds}
        (self.folder / "summary.json").write_text(json.dumps(summary) + "\n")
        print(
            f"{outcome}: {done} iterations in {seconds:.1f} s ({done / max(seconds, 1e-9):.2f} per second); "
            f"{communication}; {self.folder}",
            flush=True,
        )


def describe(flags: argparse.Namespace, origin: str, game: hvd_qgenx.Game) -> dict:
    """What config.json says: every flag, and all else that is needed to repeat the run."""
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()},
        "world_size": launch.size(),
        "batch_per_rank": flags.batch // launch.size(),
        "betas": BETAS,
        "images": origin,
        "parameters": {name: count_parameters(network) for name, network in game.items()},
        "threads_per_rank": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **({} if launch.by_torchrun() else {"horovod": launch.horovod().__version__}),
            "hvd_qgenx": hvd_qgenx.__version__,
        },
    }


# ---- training ----------------------------------------------------------------------------------------------------


def train(flags: argparse.Namespace) -> None:
    if launch.rank() == 0:
        print(launch.describe(), flush=True)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size()))
    if flags.device == "cuda":
        torch.cuda.set_device(launch.local_rank())
        hvd_qgenx.Compression.qgenx(device="cuda")  # asks for this process: its gradients are coded where they are
    if flags.batch < launch.size():
        raise TrainingError(f"--batch {flags.batch} is too small: each of the {launch.size()} ranks needs an image.")
    images, origin = load_images(flags.data)
    batches = minibatches(images, flags.batch // launch.size(), flags.seed, launch.rank(), launch.size())

    torch.manual_seed(flags.seed)  # for the weights alone; whatever other ranks draw, rank 0's are broadcast
    game = hvd_qgenx.Game({"generator": Generator(flags.width, flags.latent), "critic": Critic(flags.width)})
    generator, critic = game.to(flags.device).values()
    average = copy.deepcopy(generator).requires_grad_(False)

    opt = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraAdam(
            [
                {"params": generator.parameters(), "lr": flags.lr_generator},
                {"params": critic.parameters(), "lr": flags.lr_critic},
            ],
            betas=BETAS,
        ),
        named_parameters=game.named_parameters(),
        compression=COMPRESSIONS[flags.compression](flags.seed),
        **launch.optimizer_options(),
    )
    launch.copy_from_first(game.state_dict(), opt)
    average.load_state_dict(generator.state_dict())

    stream = random_stream(flags.seed, launch.rank(), 0, flags.device)
    shown = torch.randn(
        SAMPLES, flags.latent, generator=random_stream(flags.seed, 0, 1, flags.device), device=flags.device
    )

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        """Puts this rank's gradient of both losses, on a new minibatch and new noise, into p.grad."""
        real = next(batches).to(flags.device)
        noise = torch.randn(len(real), flags.latent, generator=stream, device=flags.device)
        mixing = torch.rand(len(real), 1, 1, 1, generator=stream, device=flags.device)
        fake = generator(noise)
        opt.zero_grad()
        loss_critic = critic_loss(critic, real, fake, mixing, flags.penalty)
        loss_generator = generator_loss(critic, fake)
        game.backward(generator=loss_generator, critic=loss_critic)  # to each player the gradient of its own loss
        return loss_generator.detach(), loss_critic.detach()

    def sample(iteration: int) -> None:
        if log.active:
            with torch.no_grad():
                save_grid(average(shown), log.folder / f"samples_{iteration:06d}.png")

    def log_row(iteration: int, losses: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Logs the losses at x_{t+1/2} and what has been sent. Losses and seconds are averages over the ranks."""
        values = torch.stack([*losses, torch.tensor(log.seconds(), device=flags.device)])
        *mean, seconds = launch.mean(values.cpu(), name="train.log").tolist()
        if not all(map(math.isfinite, mean)):
            raise TrainingError(f"The losses are not finite at iteration {iteration}; lower the learning rates.")
        exchanged = 2 * iteration * count_parameters(game)
        log.row(
            {
                "iteration": iteration,
                "seconds": round(seconds, 3),
                "loss_generator": mean[0],
                "loss_critic": mean[1],
                "bytes_sent": opt.communication.bytes_sent,
                "bytes_float32": 4 * exchanged,
                "bits_per_coordinate": opt.communication.bits_per_coordinate,
                "variance": opt.communication.variance,
            }
        )
        return seconds

    log = Log(flags, describe(flags, origin, game))
    sample(0)
    try:
        for iteration in range(1, flags.iterations + 1):
            gradients()
            opt.extrapolation()
            losses = gradients()
            opt.step()

            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), generator.parameters(), strict=True):
                    mean.lerp_(parameter, 1 - flags.average)
            log.bar.update()
            last = iteration == flags.iterations
            if iteration % flags.log_every == 0 or last:
                # The seconds are the same number on all ranks, so all ranks stop after the same iteration.
                seconds = log_row(iteration, losses)
                last = last or (flags.minutes is not None and seconds > 60 * flags.minutes)
            if iteration % flags.sample_every == 0 or last:
                sample(iteration)
            if flags.check_replicas and (iteration % flags.check_replicas == 0 or last):
                check_replicas(list(game.parameters()), iteration)
            if last:
                break
        if log.active:
            keep(log.folder, {**game, "average": average})
    except KeyboardInterrupt:
        log.finish("Stopped", opt.communication)
        raise
    checked = ", all replicas bit-identical" if flags.check_replicas else ""
    log.finish(f"Finished{checked}", opt.communication)


def keep(folder: Path, networks: dict[str, nn.Module]) -> None:
    torch.save({name: network.state_dict() for name, network in networks.items()}, folder / "weights.pt")
    try:
        save_curves(folder)
    except ImportError:
        print("No curves.png: matplotlib is not installed (pip install matplotlib).", flush=True)


if __name__ == "__main__":
    flags = parse_flags()
    sys.exit(run(lambda: train(flags), "wgan.py", SourceError))
