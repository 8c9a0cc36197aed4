"""What all benchmarks write into their rows, and how the rows get into a file."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from pathlib import Path

import hvd_qgenx

ROOT = Path(__file__).resolve().parent.parent


def provenance() -> dict:
    """Commit (marked if the package differs from it; the version where there is no checkout), date, device."""
    return {
        "commit": _commit() if (ROOT / ".git").exists() else hvd_qgenx.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU {platform.machine()}, {os.cpu_count()} cores",
    }


def append(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Adds rows to a CSV file, which gets its header if it is new."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "hvd_qgenx") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
