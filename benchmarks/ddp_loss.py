"""Does a network learn as well when its gradients are coded? ResNet-18 on CIFAR-10's pictures, several seeds.

    torchrun --nproc-per-node 2 benchmarks/ddp_loss.py --batch 16      # 3 seeds of 200 iterations: 20 minutes
    torchrun --nproc-per-node 2 benchmarks/ddp_loss.py --iterations 4 --width 4 --seeds 0 --results loss.csv
    python benchmarks/ddp_loss.py --table                              # Markdown from the committed rows

The loader of train/ has pictures without labels, so the network learns by how many right angles each was turned, of
which there are four; at random the loss is ln 4 = 1.386. For one seed all methods have the same weights and batches.
The loss is the mean over ranks and the last tenth of the iterations, before the step.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from records import ROOT, append, provenance
from resnet18 import resnet18
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(ROOT), str(ROOT / "train")]
import launch  # noqa: E402 - train/'s, and only from a checkout
from data import CHOICES, load_images, minibatches  # noqa: E402

from hvd_qgenx.ddp import QGenXState, qgenx_hook  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "ddp_loss.csv"
COLUMNS = [
    "commit", "date", "device", "images", "ranks", "batch", "width", "lr", "iterations", "method", "seed", "loss",
]  # fmt: skip
METHODS = ("float32", "qgenx_4")


def train(method: str, seed: int, images, flags) -> float:
    """The loss at the end."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(resnet18(4, flags.width))
    if method != "float32":
        model.register_comm_hook(QGenXState(bits=int(method.split("_")[1]), seed=seed), qgenx_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=flags.lr, momentum=0.9, weight_decay=5e-4)
    batches = minibatches(images, flags.batch, seed, dist.get_rank(), dist.get_world_size())
    turns, losses = torch.Generator().manual_seed(1000 * seed + dist.get_rank()), []
    for _ in range(flags.iterations):
        pictures, labels = turned(next(batches), turns)
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(flags.iterations // 10, 1) :]).mean()
    return float(launch.mean(last, name="loss"))


def turned(pictures: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(4, (len(pictures),), generator=generator)
    return torch.stack([torch.rot90(p, int(k), (1, 2)) for p, k in zip(pictures, labels, strict=True)]), labels


def table() -> str:
    """The mean over seeds, and their spread."""
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| learning rate | method | loss, each seed | mean | standard deviation |", "|---|---|---|---|---|"]
    for rate, method in sorted({(row["lr"], row["method"]) for row in rows}):
        losses = [float(row["loss"]) for row in rows if (row["lr"], row["method"]) == (rate, method)]
        spread = f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        lines.append(f"| {rate} | {method} | {each} | {statistics.fmean(losses):.3f} | {spread} |")
    return "\n".join(lines)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed rows, and end")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="pictures of a rank")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--data", choices=CHOICES, default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    flags = parsed()
    if flags.table:
        print(table())
        return
    launch.start()
    images, origin = load_images(flags.data)
    about = {**provenance(), "images": origin, "ranks": dist.get_world_size(), "batch": flags.batch,
             "width": flags.width, "lr": flags.lr, "iterations": flags.iterations}  # fmt: skip
    for seed in flags.seeds:
        for method in flags.methods:
            loss = train(method, seed, images, flags)
            if dist.get_rank() == 0:
                row = {**about, "method": method, "seed": seed, "loss": f"{loss:.4f}"}
                append(flags.results, COLUMNS, [row])
                print(f"seed {seed}, {method}: loss {loss:.4f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
