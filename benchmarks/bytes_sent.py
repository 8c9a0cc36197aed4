"""What each compression choice hands to collectives, on the gradients of the WGAN-GP that train/wgan.py trains.

    horovodrun -np 3 python benchmarks/bytes_sent.py            # appends rows to benchmarks/results/bytes_sent.csv
    python benchmarks/bytes_sent.py --table                     # prints the newest rows as the README's table

Every choice starts from the same weights and trains by extra-gradient on the same images and noise. The first
iteration, which also agrees on settings and fits levels, is reported apart; the others are averaged.
"""

from __future__ import annotations

import argparse
import csv
import sys

from records import ROOT, append, provenance

RESULTS = ROOT / "benchmarks" / "results" / "bytes_sent.csv"
COLUMNS = ["commit", "date", "device", "ranks", "width", "coordinates", "choice", "exchanges", "bytes_first_iteration",
           "bytes_per_exchange", "bits_per_coordinate", "float32_over_sent", "relative_variance"]  # fmt: skip
CHOICES = {
    "none": "`Compression.none`",
    "fp16": "`Compression.fp16`",
    "fixed8": "8 bits, uniform levels, L-infinity, fixed width",
    "fixed4": "4 bits, uniform levels, L-infinity, fixed width",
    "qgenx": "`Compression.qgenx(bits=4)`: adaptive levels, L2, Huffman",
}


def measure(choice: str, width: int, batch: int, iterations: int, images) -> dict:
    """Trains a few iterations under one choice and returns its row."""
    import horovod.torch as hvd
    import torch
    from models import Critic, Generator, critic_loss, generator_loss

    import hvd_qgenx

    torch.manual_seed(0)
    generator, critic = Generator(width, 128), Critic(width)
    parameters = [*generator.parameters(), *critic.parameters()]
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraAdam(parameters, lr=2e-4, betas=(0.5, 0.9)), compression=compression(choice)
    )
    random = torch.Generator().manual_seed(1 + hvd.rank())

    def half_step(move):
        real = images[torch.randint(len(images), (batch,), generator=random)]
        fake = generator(torch.randn(batch, 128, generator=random))
        optimizer.zero_grad()
        mixing = torch.rand(batch, 1, 1, 1, generator=random)
        critic_loss(critic, real, fake, mixing, 10.0).backward(inputs=list(critic.parameters()))
        generator_loss(critic, fake).backward(inputs=list(generator.parameters()))
        move()

    sent = [0]
    for _ in range(iterations):
        half_step(optimizer.extrapolation)
        half_step(optimizer.step)
        sent.append(optimizer.communication.bytes_sent)
    coordinates, exchanges = sum(p.numel() for p in parameters), 2 * (iterations - 1)
    per_exchange = (sent[-1] - sent[1]) / exchanges
    return {
        "ranks": hvd.size(),
        "width": width,
        "coordinates": coordinates,
        "choice": choice,
        "exchanges": exchanges,
        "bytes_first_iteration": sent[1],
        "bytes_per_exchange": round(per_exchange),
        "bits_per_coordinate": round(8 * per_exchange / coordinates, 3),
        "float32_over_sent": round(4 * coordinates / per_exchange, 2),
        "relative_variance": f"{optimizer.communication.variance or 0.0:.3g}",
    }


def compression(choice: str):
    """The choices of train/wgan.py."""
    from hvd_qgenx import Compression

    if choice in ("none", "fp16"):
        return getattr(Compression, choice)
    if choice == "qgenx":
        return Compression.qgenx(bits=4)
    return Compression.qgenx(bits=int(choice[-1]), levels="uniform", coder="fixed", norm="linf")


def run(width: int, batch: int, iterations: int) -> None:
    """Measures every choice; rank 0 appends the rows and prints the table."""
    sys.path.insert(0, str(ROOT / "train"))
    import horovod.torch as hvd
    import torch
    from data import load_images

    hvd.init()
    torch.set_num_threads(1)
    images = torch.tensor(load_images("auto")[0][:2000]).float().div(127.5).sub(1)
    rows = []
    for choice in CHOICES:
        rows.append({**provenance(), **measure(choice, width, batch, iterations, images)})
        if hvd.rank() == 0:
            print(f"{choice}: {rows[-1]['bits_per_coordinate']} bits per coordinate", flush=True)
    if hvd.rank() == 0:
        append(RESULTS, COLUMNS, rows)
        print(table())


def table() -> str:
    """The newest row of every choice, as Markdown."""
    with open(RESULTS, newline="") as file:
        newest = {row["choice"]: row for row in csv.DictReader(file)}
    lines = [
        "| choice | bytes per exchange and rank | bits per coordinate | float32 / sent | relative variance |",
        "|---|---|---|---|---|",
    ]
    for choice, label in CHOICES.items():
        row = newest[choice]
        cells = [f"{int(row['bytes_per_exchange']):,}", row["bits_per_coordinate"], row["float32_over_sent"]]
        variance = "0" if choice == "none" else "not measured" if choice == "fp16" else row["relative_variance"]
        lines.append(f"| {' | '.join([label, *cells, variance])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the newest rows and end")
    parser.add_argument("--width", type=int, default=64, help="channels of both networks")
    parser.add_argument("--batch", type=int, default=2, help="images per rank and half-step")
    parser.add_argument("--iterations", type=int, default=3)
    flags = parser.parse_args()
    if flags.table:
        print(table())
    else:
        run(flags.width, flags.batch, flags.iterations)
