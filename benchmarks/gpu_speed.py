"""Proves the kernels on a GPU, and says how fast they are beside a copy of the gradient on the device.

    python benchmarks/gpu_speed.py --check              # all of it; writes rows to benchmarks/results/gpu_speed.csv
    python benchmarks/gpu_speed.py --check --cases 20000

Bytes, means and refusals are compared with the compiled core's first, on drawn cases of all settings. Then, where
compute-sanitizer is there, some cases run under its memcheck and racecheck. Times are medians of events on the device;
a speed is the time of a device-to-device copy of the gradient over that of the call, in the same run. On a machine
without a GPU it says so and ends with 2: nothing is written.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import ROOT, append, provenance
from torch import Tensor

from hvd_qgenx import Codec, Key, Levels, backends, gpu_backend
from hvd_qgenx.adaptation import Statistics, fit
from hvd_qgenx.backends.compiled import Compiled, best_path

sys.path.insert(0, str(ROOT / "tests" / "gpu"))

RESULTS = ROOT / "benchmarks" / "results" / "gpu_speed.csv"
COLUMNS = ["commit", "date", "device", "driver", "coordinates", "row", "milliseconds", "copies"]
PAYLOADS = 3


def check(ours, cases: int, damaged: int) -> None:
    """Compares drawn cases on a device, by a backend for vectors on the CPU, with the core; ends at the first that
    differs."""
    from cases import Case, compare, compare_damaged

    core = Compiled(best_path())
    for number in range(cases):
        if wrong := compare(Case(number), ours, core):
            raise SystemExit(f"case {number} differs on the device: {wrong}")
    refused = 0
    for number in range(damaged):
        wrong, is_refused = compare_damaged(Case(number), ours, core)
        refused += is_refused
        if wrong:
            raise SystemExit(f"case {number} differs on the device: {wrong}")
    print(f"{cases} cases and {damaged} damaged payloads, {refused} of them refused: all equal to the core's")


class OnDevice:
    """The device's backend, for vectors on the CPU: they go there and come back."""

    def __init__(self) -> None:
        self.backend = backends.backend_of(torch.device("cuda"))

    def encode(self, codebook, norm, layout, key, segments, out, inline):
        moved = [segment.cuda() for segment in segments]
        return self.backend.encode(codebook, norm, layout, key, moved, out, inline)

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        moved = [target.cuda() for target in targets]
        broken = self.backend.decode_mean(codebook, payloads, moved, sections, factor)
        for target, found in zip(targets, moved, strict=True):
            target.copy_(found)
        return broken

    def statistics(self, norm, layout, segments, form):
        return self.backend.statistics(norm, layout, [segment.cuda() for segment in segments], form)


def sanitize() -> None:
    """Some cases under compute-sanitizer: memory, and races, which no emulation sees."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        print("compute-sanitizer is not installed: memcheck and racecheck were not run")
        return
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__, "--check", "--cases", "40"]
        subprocess.run([*command, "--damaged", "40", "--only-check"], check=True)
        print(f"{name}: nothing found")


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """The median time of a call between two events on the device."""
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def measure(numel: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each row. Calls are whole ones: kernels, waiting, copies, checksums."""
    vector = torch.randn(numel, device="cuda")
    codec = _fitted(vector)
    layout, backend = codec.layout([numel]), backends.backend_of(vector.device)
    outs = [torch.empty(codec.bound(numel), dtype=torch.uint8, pin_memory=True) for _ in range(PAYLOADS)]
    payloads = [out[: _encode(backend, codec, layout, vector, out, rank)] for rank, out in enumerate(outs)]
    mean, copy = torch.empty_like(vector), torch.empty_like(vector)
    host = torch.empty(numel, pin_memory=True)
    rows = {
        "copy on the device": lambda: copy.copy_(vector),
        "copy to the host": lambda: host.copy_(vector, non_blocking=True),
        "encode": lambda: _encode(backend, codec, layout, vector, outs[0], 0),
        "decode of 3": lambda: backend.decode_mean(codec.codebook, payloads, [mean]),
        "statistics": lambda: codec.statistics([vector], layout, "histogram"),
        "payload to the host": lambda: outs[0][: len(payloads[0])].copy_(payloads_on(payloads[0])),
    }
    found = {name: milliseconds(call, rounds) for name, call in rows.items()}
    return found | _kernels_alone(rows, rounds)


def payloads_on(payload: Tensor) -> Tensor:
    """A payload on the device, kept from call to call."""
    if not hasattr(payloads_on, "kept"):
        payloads_on.kept = payload.cuda()  # type: ignore[attr-defined]
    return payloads_on.kept  # type: ignore[attr-defined]


def _kernels_alone(rows: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Milliseconds in each kernel of ours for one call, by events around each launch."""
    device = backends.backend_of(torch.device("cuda")).device  # type: ignore[attr-defined]
    launch, spent = device.launch, {}

    def timed(kernel, *arguments):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch(kernel, *arguments)
        end.record()
        spent.setdefault(f"kernel {kernel}", []).append((start, end))

    device.launch = timed
    try:
        for _ in range(rounds):
            for name in ("encode", "decode of 3", "statistics"):
                rows[name]()
        torch.cuda.synchronize()
    finally:
        del device.launch
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in spent.items()}


def exchange(numel: int, rounds: int) -> dict[str, float]:
    """Milliseconds of an exchange of one rank with itself, without a network: all that is not the link."""
    vector = torch.randn(numel, device="cuda")
    codec = _fitted(vector)
    layout, backend = codec.layout([numel]), backends.backend_of(vector.device)
    out = torch.empty(codec.bound(numel), dtype=torch.uint8, pin_memory=True)

    def whole():
        size = _encode(backend, codec, layout, vector, out, 0)
        backend.decode_mean(codec.codebook, [out[:size]] * PAYLOADS, [vector])

    def on_the_cpu():
        moved, core = vector.cpu(), Compiled(best_path())
        size = _encode(core, codec, layout, moved, out, 0)
        core.decode_mean(codec.codebook, [out[:size]] * PAYLOADS, [moved])
        vector.copy_(moved)

    return {"exchange of 3": milliseconds(whole, rounds), "exchange of 3 on the CPU": milliseconds(on_the_cpu, 3)}


def _encode(backend, codec: Codec, layout, vector: Tensor, out: Tensor, rank: int) -> int:
    return backend.encode(codec.codebook, codec.norm, layout, Key(0, rank, 0), [vector], out, False).size


def _fitted(vector: Tensor) -> Codec:
    """4 bits, levels and code lengths fitted to the gradient, as adaptation does."""
    codec = Codec(Levels.exponential(4))
    fitted = fit(Statistics.measure(codec, [vector], codec.layout([len(vector)]), "histogram"), 4, 0.0)
    assert fitted is not None
    levels, counts = fitted
    return Codec(levels, counts=counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="prove the bytes first")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--damaged", type=int, default=2000)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only-check", action="store_true", help="measure nothing")
    flags = parser.parse_args()
    if not torch.cuda.is_available() or not backends.take_gpu():
        print(f"no kernels can run here: {gpu_backend()}", file=sys.stderr)
        raise SystemExit(2)
    if flags.check or flags.only_check:
        check(OnDevice(), flags.cases, flags.damaged)
    if flags.only_check:
        return
    if flags.check:
        sanitize()
    found = measure(flags.numel, flags.rounds) | exchange(flags.numel, flags.rounds)
    common = {
        **provenance(), "device": torch.cuda.get_device_name(), "driver": str(torch.version.cuda),
        "coordinates": flags.numel,
    }  # fmt: skip
    rows = [
        {**common, "row": name, "milliseconds": f"{value:.4f}", "copies": f"{found['copy on the device'] / value:.3f}"}
        for name, value in found.items()
    ]
    append(flags.results, COLUMNS, rows)
    for row in rows:
        print(f"{row['row']:28} {row['milliseconds']:>10} ms  {row['copies']:>8} x copy")
    print(f"{time.strftime('%H:%M')}: written to {flags.results}")


if __name__ == "__main__":
    main()
