"""``horovodrun -np 3 python -m hvd_qgenx.probe``: prints the table of ``hvd_qgenx.probe``."""

from __future__ import annotations

import argparse
import sys

from hvd_qgenx.probe import NUMEL, probe
from hvd_qgenx.stock import check_horovod


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvd_qgenx.probe",
        description="Does compressing gradients pay on this network, with these cores, at this size? Run it under "
        "horovodrun, as the training: horovodrun -np 3 -H ... python -m hvd_qgenx.probe",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--numel", type=int, help=f"coordinates of the gradient (default {NUMEL:,})")
    size.add_argument("--model", help="package:function that makes the network, such as torchvision:resnet50")
    parser.add_argument("--repeats", type=int, default=20, help="exchanges of each kind, at most (default 20)")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long it may take (default 20)")
    parser.add_argument("--csv", metavar="FILE", help="write the rows to this file, too")
    return parser.parse_args()


def main() -> int:
    """Rank 0 prints; an error is a sentence on every rank."""
    flags = _arguments()
    try:
        check_horovod()
        from hvd_qgenx.transports.horovod import start

        rank = start()
        result = probe(flags.numel, None, flags.model, flags.repeats, flags.seconds, progress=True)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return 1
    if rank == 0:
        print(result, flush=True)
        if flags.csv:
            result.to_csv(flags.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
