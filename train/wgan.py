"""WGAN-GP on CIFAR-10 by distributed extra-gradient, with compressed gradient exchange.

On one machine, 3 processes, about 4 minutes on 2 cores:
    horovodrun -np 3 python train/wgan.py
    horovodrun -np 3 python train/wgan.py --compression qgenx:bits=3      # or none, fp16, fixed8, fixed4, auto
    horovodrun -np 3 python train/wgan.py --optimizer adam --critic-steps 5
    horovodrun -np 3 python train/wgan.py --resume runs/...               # goes on, bit for bit
By torchrun, without Horovod, it is the same run:
    torchrun --nproc-per-node 3 train/wgan.py
The full experiment on three machines that can reach each other by ssh:
    horovodrun -np 3 -H node1:1,node2:1,node3:1 python train/wgan.py --preset paper --device cuda

One iteration of extra-gradient moves both players at once, x = (generator, critic), each with its own learning rate:
    x_{t+1/2} = x_t - step(mean over ranks of Q(g_k(x_t)))             exchange 1, opt.extrapolation()
    x_{t+1}   = x_t - step(mean over ranks of Q(g_k(x_{t+1/2})))       exchange 2, opt.step()
where g_k is the gradient of (generator_loss, critic_loss) on rank k's own images and noise, new in each half-step.

record.py lists what a run's folder holds; score.py, sample.py and compare.py read it. Ctrl-C and SIGTERM write a
checkpoint, also between two half-steps, and count as a clean end (exit code 0).
"""

import copy
import json
import math
import os
import platform
import sys
import time
from argparse import Namespace
from pathlib import Path

import checkpoint
import launch
import numpy as np
import torch
import world
from clock import Clock, Trace
from data import SourceError, announce, load_images, minibatches
from evaluation import Evaluation, fetch_weights_everywhere
from job import Stop, TrainingError, check_replicas, random_stream, run
from lookahead import Lookahead
from methods import BETA2, Move, make_method
from models import count_parameters, critic_loss, generator_loss
from networks import make_critic, make_generator
from pictures import save_curves, save_grid, save_time
from record import METRICS, Record, check_wandb, claim, settings_of
from settings import CHANGEABLE, compression, parse_flags

import hvd_qgenx

SAMPLES = 64


class Training:
    """All that a run holds, between a checkpoint and the next: ``moves`` says how far it is."""

    def __init__(self, flags: Namespace, images: np.ndarray):
        torch.manual_seed(flags.seed)  # for the weights alone; whatever other ranks draw, rank 0's are broadcast
        networks = {
            "generator": make_generator(flags.model, flags.width, flags.latent),
            "critic": make_critic(flags.model, flags.width),
        }
        self.flags, self.images = flags, images
        self.game = hvd_qgenx.Game(networks).to(flags.device)
        self.generator, self.critic = self.game.values()
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.method = make_method(flags, self.game)
        self.lookahead = Lookahead(self.game.parameters(), flags.lookahead)
        self.moves = 0
        self.losses = torch.zeros(2)
        self.clock = Clock(self.method.seconds, flags.profile and flags.device == "cuda")

    def begin(self, content: dict | None) -> None:
        """From rank 0's fresh weights, or from a checkpoint."""
        if content is None:
            world.share_start(self.game, list(self.method.optimizers))
            self.average.load_state_dict(self.generator.state_dict())
            self.lookahead.start()
        else:
            self._restore(content)
        size = self.flags.batch // world.size()
        self.batches = minibatches(self.images, size, self.flags.seed, world.rank(), world.size(), self.moves)

    def _restore(self, content: dict) -> None:
        self.game.load_state_dict(content["game"])
        self.average.load_state_dict(content["average"])
        self.method.load(content["method"], content["counts"])
        self.lookahead.start(content.get("slow"))  # which older checkpoints lack
        self.moves, self.losses = content["moves"], content["losses"]

    def content(self, seconds: float) -> dict:
        """What a checkpoint holds; equal on all ranks but for the time and the counters."""
        return {
            "game": self.game.state_dict(),
            "average": self.average.state_dict(),
            "method": self.method.state_dict(),
            "slow": self.lookahead.slow,
            "counts": self.method.counts(),
            "losses": self.losses,
            "iteration": self.iteration,
            "seconds": seconds,
            "world_size": world.size(),
        }

    @property
    def iteration(self) -> int:
        """How many are complete."""
        return self.moves // len(self.method.moves)

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.game.parameters())

    def iterate(self, stop: Stop) -> bool:
        """Makes the moves that are left of an iteration; False if all ranks stop before one of them."""
        count = len(self.method.moves)
        for move in self.method.moves[self.moves % count :]:
            question = world.ask(stop.asked, "train.stop")
            move.prepare()
            self.losses = self.gradients(move)
            if world.answer(question):
                self.method.zero_grad()  # this gradient will be taken again
                return False
            with self.clock("update"):
                move.act()
            self.moves += 1
        self.lookahead.after(self.iteration)
        self._follow()
        return True

    def gradients(self, move: Move) -> torch.Tensor:
        """Puts this rank's gradients of the players that move, on a new minibatch and new noise, into p.grad."""
        device, flags = self.flags.device, self.flags
        with self.clock("data"):
            real = next(self.batches).to(device)
            # A stream for every move: a run that goes on needs no memory of those before.
            stream = random_stream(flags.seed, world.rank(), 3, device, self.moves)
            noise = torch.randn(len(real), flags.latent, generator=stream, device=device)
            mixing = torch.rand(len(real), 1, 1, 1, generator=stream, device=device)
        with self.clock("forward"), torch.autocast(device, torch.bfloat16, enabled=flags.autocast):
            losses = self._losses(move, real, noise, mixing)
        with self.clock("backward"):
            self.method.zero_grad()
            if len(move.players) == 2:
                self.game.backward(**losses)  # to each player the gradient of its own loss
            else:
                (player,) = move.players
                torch.autograd.backward(losses[player], inputs=list(self.game[player].parameters()))
        known = dict(zip(("generator", "critic"), self.losses.tolist(), strict=True))
        return torch.tensor(list({**known, **{player: loss.item() for player, loss in losses.items()}}.values()))

    def _losses(self, move: Move, real, noise, mixing) -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled("generator" in move.players):
            fake = self.generator(noise).float()  # the penalty mixes them with real images, also under autocast
        losses = {}
        if "generator" in move.players:
            losses["generator"] = generator_loss(self.critic, fake)
        if "critic" in move.players:
            losses["critic"] = critic_loss(self.critic, real, fake, mixing, self.flags.penalty, self.flags.drift)
        return losses

    @torch.no_grad()
    def _follow(self) -> None:
        """The moving average takes in x_t; it starts quickly, or the first weights would stay in it for long."""
        decay = min(self.flags.average, (1 + self.iteration) / (10 + self.iteration))
        for mean, parameter in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)


class Session:
    """A training between its start, or resumption, and its end: when to log, save, draw and score."""

    def __init__(self, training: Training, record: Record, stop: Stop):
        self.training, self.record, self.stop, self.flags = training, record, stop, training.flags
        self.logged, self.saved = training.iteration, training.moves
        self.evaluation: Evaluation | None = None
        noise = random_stream(self.flags.seed, 0, 1, self.flags.device)
        self.shown = torch.randn(SAMPLES, self.flags.latent, generator=noise, device=self.flags.device)
        self.trace = Trace(record.folder / "trace.json", self.flags.trace if record.active else 0, self.flags.device)

    def run(self) -> str:
        """Trains; says how it ended."""
        if self.flags.score_every:
            self.evaluation = self._evaluation()
        if self.training.iteration == 0:
            self._sample()
        elif not self._score_if_due(self.training.iteration):
            return "Stopped"  # while a score was made good that the run had not come to
        last = self._is_over(None)
        while not last:
            self.trace.before_iteration()
            if not self.training.iterate(self.stop):
                self._save()
                return "Stopped"
            self.trace.after_iteration()
            self.record.bar.update()
            last = self._after_iteration()
            if last is None:
                return "Stopped"
        return "Finished"

    def _after_iteration(self) -> bool | None:
        """Whether this was the last; None if the run was stopped while it was scored."""
        iteration, flags = self.training.iteration, self.flags
        seconds = None
        if iteration % flags.log_every == 0 or iteration == flags.iterations:
            seconds = self._log()
        last = self._is_over(seconds)
        scores_now = self.evaluation is not None and (last or iteration % flags.score_every == 0)
        if last or scores_now or iteration % flags.checkpoint_every == 0:
            self._save()
        if last or iteration % flags.sample_every == 0:
            self._sample()
        if flags.check_replicas and (last or iteration % flags.check_replicas == 0):
            check_replicas(list(self.training.game.parameters()), iteration)
        if scores_now and not self._score(iteration):
            return None
        return last

    def _is_over(self, seconds: float | None) -> bool:
        """The same on all ranks: they were told the same seconds."""
        late = self.flags.minutes is not None and seconds is not None and seconds > 60 * self.flags.minutes
        return late or self.training.iteration >= self.flags.iterations

    def _log(self) -> float:
        """Logs the losses at the last move and what has been sent. Losses and seconds are averages over the ranks."""
        training, iteration = self.training, self.training.iteration
        problem = float(self.record.problem is not None)
        own = [*training.losses.tolist(), self.record.seconds(), problem]
        generator, critic, seconds, problems = world.mean(torch.tensor(own, dtype=torch.float64), "train.log").tolist()
        if problems:
            raise TrainingError(world.from_first(self.record.problem, "train.problem"))
        if not (math.isfinite(generator) and math.isfinite(critic)):
            raise TrainingError(f"The losses are not finite at iteration {iteration}; lower the learning rates.")
        counted = training.method.counted()
        players = {name: count_parameters(network) for name, network in training.game.items()}
        dense = sum(players[player] for move in training.method.moves for player in move.players)
        self.record.row(
            {
                "iteration": iteration,
                "seconds": round(seconds, 3),
                "loss_generator": generator,
                "loss_critic": critic,
                "bytes_sent": int(counted["bytes_sent"]),
                "bytes_float32": 4 * iteration * dense,
                "bits_per_coordinate": 8 * counted["bytes_sent"] / max(counted["coordinates"], 1),
                "variance": counted["squared_error"] / counted["squared_norm"] if counted["squared_norm"] else None,
                **training.clock.take(iteration - self.logged),
            }
        )
        self.logged = iteration
        return seconds

    def _save(self) -> None:
        """Rank 0 writes a checkpoint; what goes wrong ends all ranks, and the older checkpoints stay."""
        if self.saved == self.training.moves:
            return
        problem = None
        if self.record.active:
            problem = self._written()
        if problem := world.from_first(problem or self.record.problem, "train.save"):
            raise TrainingError(problem)
        self.saved = self.training.moves

    def _written(self) -> str | None:
        if not self.training.finite():
            return f"The weights are not finite at iteration {self.training.iteration}; lower the learning rates."
        try:
            content = self.training.content(self.record.seconds())
            checkpoint.save(self.record.folder, self.training.moves, content)
        except checkpoint.CheckpointError as error:
            return str(error)
        return None

    def _sample(self) -> None:
        if self.record.active:
            with torch.no_grad(), self.record.writing():
                path = self.record.folder / f"samples_{self.training.iteration:06d}.png"
                save_grid(self.training.average(self.shown), path)

    def _evaluation(self) -> Evaluation | None:
        with self.record.pause():
            flags = self.flags
            return Evaluation(
                self.training.images, flags.score_samples, flags.reference, flags.device, self._stops_everywhere
            )

    def _stops_everywhere(self) -> bool:
        return world.answer(world.ask(self.stop.asked, "train.stop"))

    def _score_if_due(self, iteration: int) -> bool:
        """What an earlier job of this run did not come to; False if the run was stopped meanwhile."""
        ends = iteration >= self.flags.iterations
        due = self.evaluation is not None and (ends or iteration % self.flags.score_every == 0)
        made = self.record.scored(iteration) if self.record.active else None
        return not due or world.from_first(made, "train.scored") or self._score(iteration)

    def _score(self, iteration: int) -> bool:
        assert self.evaluation is not None
        with self.record.pause():
            scores = self.evaluation.score(self.training.average, self.flags.latent, self.flags.seed)
        if world.from_first(scores is None, "train.score"):
            return False
        if scores is not None:
            self.record.score(iteration, scores)
        return True


# ---- a new run, or one that goes on --------------------------------------------------------------------------------


def describe(flags: Namespace, origin: str, game: hvd_qgenx.Game) -> dict:
    """What config.json says: every flag, and all else that is needed to repeat the run."""
    plain = {name: value for name, value in vars(flags).items() if name != "given"}
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in plain.items()},
        "compression": flags.compression.text,
        "world_size": world.size(),
        "batch_per_rank": flags.batch // world.size(),
        "betas": (flags.beta1, BETA2),
        "images": origin,
        "parameters": {name: count_parameters(network) for name, network in game.items()},
        "threads_per_rank": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **world.versions(),
            "hvd_qgenx": hvd_qgenx.__version__,
        },
    }


def take_up(flags: Namespace) -> tuple[Namespace, dict]:
    """The settings of the run in --resume, with those that may change taken from the flags; and its checkpoint.

    Raises:
        TrainingError: on all ranks, if there is nothing to go on from, or if a flag asks for another run.
    """
    saved, content, problem = None, None, None
    if world.rank() == 0:
        try:
            saved = settings_of(flags.resume)
            content, warnings = checkpoint.load_last(flags.resume)
            for warning in warnings:
                print(f"Warning: {warning} The one before it is used.", flush=True)
        except (OSError, json.JSONDecodeError) as error:
            problem = f"{flags.resume} holds no run to go on with ({error})."
        except checkpoint.CheckpointError as error:
            problem = str(error)
    saved, content, problem = world.from_first((saved, content, problem), "train.resume")
    if problem:
        raise TrainingError(problem)
    return merged(flags, saved), content


def merged(flags: Namespace, saved: dict) -> Namespace:
    """Raises TrainingError, naming the first flag that is given and is not what the run began with."""
    result = vars(flags).copy()
    for name in set(result) & set(saved) - {"given", "config", "resume", "out"}:
        before = compression(saved[name]) if name == "compression" else saved[name]
        if name in flags.given and name not in CHANGEABLE and result[name] != before:
            shown = getattr(result[name], "text", result[name])
            raise TrainingError(f"The run in {flags.resume} has --{name.replace('_', '-')} {saved[name]}, not {shown}.")
        if name not in flags.given:
            result[name] = before
    return Namespace(**{**result, "out": flags.resume})


def tell_of_ranks(content: dict) -> None:
    if content["world_size"] != world.size():
        announce(
            f"Notice: {world.size()} ranks go on where {content['world_size']} were. Weights, moving average, "
            "optimizer, levels and counters continue; each rank's images, noise and rounding are new, so this is "
            "another run from here on."
        )


def check_size(flags: Namespace) -> None:
    if flags.batch < world.size():
        raise TrainingError(f"--batch {flags.batch} is too small: each of the {world.size()} ranks needs an image.")
    if flags.device == "cuda":
        if world.local_rank() == 0 and world.local_size() > torch.cuda.device_count():
            print(f"Notice: {world.local_size()} ranks share {torch.cuda.device_count()} GPU of this host.", flush=True)
        torch.cuda.set_device(world.local_rank() % torch.cuda.device_count())
        hvd_qgenx.Compression.qgenx(device="cuda")  # asks for this process: its gradients are coded where they are


def train(flags: Namespace) -> None:
    announce(launch.describe())
    torch.set_num_threads(flags.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size()))
    content = None
    if flags.resume:
        flags, content = take_up(flags)
        tell_of_ranks(content)
    check_size(flags)
    check_wandb(flags.wandb)
    if flags.score_every:
        fetch_weights_everywhere()
    images, origin = load_images(flags.data)
    folder = flags.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{flags.compression.name}"
    training = Training(flags, images)
    config = describe(flags, origin, training.game)
    lock = claim(folder, None if content else config)
    training.begin(content)
    record = Record(folder, config, training.iteration, content["seconds"] if content else 0.0)
    session = Session(training, record, Stop())
    outcome = session.run()
    session.trace.end()
    finish(session, outcome)
    del lock


def finish(session: Session, outcome: str) -> None:
    record, iteration = session.record, session.training.iteration
    hint = f". Go on: --resume {record.folder}" if outcome == "Stopped" else ""
    if outcome == "Finished":
        outcome += ", all replicas bit-identical" if session.flags.check_replicas else ""
        if record.active:
            draw(record)
    record.finish(outcome, iteration, hint)
    if problem := world.from_first(record.problem, "train.problem"):
        raise TrainingError(problem)


def draw(record: Record) -> None:
    try:
        if (record.folder / METRICS).exists():
            with record.writing():
                save_curves(record.folder)
                save_time(record.folder)
    except ImportError:
        print("No curves.png: matplotlib is not installed (pip install matplotlib).", flush=True)


if __name__ == "__main__":
    flags = parse_flags(__doc__)
    sys.exit(run(lambda: train(flags), "wgan.py", SourceError))
