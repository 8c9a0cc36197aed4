"""How fast the codec is beside a memcpy of the gradient, how few bits it takes, and what else one could use.

    python benchmarks/codec_speed.py             # 3 minutes; writes codec_speed.csv and .png to benchmarks/results
    python benchmarks/codec_speed.py --table     # prints the committed rows as the table of docs/speed.md

One core, a gradient of 64 MiB. In every round each call is timed once, so that slow phases of the machine fall on all
of them alike, and the samples that met the core at its full pace count (see ``medians``); a speed is the median time
of a memcpy of the gradient over the median time of the call. What is decoded is compared with the specification in
plain torch before anything is timed. Levels and code lengths of the adaptive rows are fitted to the gradient that they
are timed on.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import hashlib
import importlib.util
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from records import ROOT, provenance
from torch import Tensor

import hvd_qgenx
from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.adaptation import Statistics, fit
from hvd_qgenx.backends.specification import quantize, received

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ["commit", "date", "device", "backend", "coordinates", "rounds", "row", "figure", "value", "unit",
           "milliseconds"]  # fmt: skip
PAYLOADS = 3  # whose mean is decoded: each is read, and added to what is there
HEADER_BITS = 48  # of a bucket: norm and length
HASHED = bytes(2**20)
CHECKED = 2**20  # coordinates that are compared with the specification, which takes a second for as many

CODECS = {
    "packed4": "4 bits uniform, L-infinity, packed",
    "packed8": "8 bits uniform, L-infinity, packed",
    "adaptive4": "4 bits adaptive, L2, Huffman",
    "exponential4": "4 bits exponential, L2, Huffman",
    "uniform4_l2": "4 bits uniform, L2, Huffman",
    "uniform8": "8 bits uniform, L-infinity, Huffman",
    "ternary": "ternary, L-infinity, Huffman",
    "ternary_l2": "ternary, L2, Huffman with runs",
    "gamma": "4 bits adaptive, L2, Elias gamma",
    "delta": "4 bits adaptive, L2, Elias delta",
    "omega": "4 bits adaptive, L2, Elias omega",
    "elias_runs": "4 bits uniform, L2, QSGD's Elias runs",
}
PEERS = {
    "fp16": "Horovod's `Compression.fp16`",
    "grace": "QSGD by GRACE's formula in torch, int8",
    "zstd": "zstd -1 of the packed symbols alone",
    "constriction": "constriction's ANS of the symbols alone",
}
NEEDS = {"fp16": "horovod", "zstd": "zstandard", "constriction": "constriction"}
SHOWN = {  # figures, as the head of the table calls them
    "bits": "bits per coordinate",
    "encode": "encode",
    "decode": "decode + add",
    "encode_two": "encode by two threads",
    "decode_two": "decode by two",
    "over_entropy": "% over entropy",
}
OTHERS = {
    "two_calls": "4 bits adaptive, L2, Huffman: two calls at once, by one thread each",
    "over_grace": "4 bits adaptive, L2, Huffman: times faster than GRACE's formula",
    "memory_out": "its peak memory beyond the gradient, multiples of it, `out=` given",
    "memory": "the same, `out=` not given",
}
OVERHEADS = ("adaptive4", "uniform4_l2", "ternary_l2")  # whose bits are compared with the entropy
PACKED = ("packed4", "packed8")


@dataclass(frozen=True)
class Timed:
    """A call to be timed, which handles ``vectors`` gradients."""

    row: str
    figure: str
    call: Callable[[], object]
    threads: int = 1
    vectors: int = 1


@dataclass(frozen=True)
class Peer:
    encode: Callable[[], object]
    decode: Callable[[], object]
    bits: float


# ---- what is measured ------------------------------------------------------------------------------------------------


def codecs(gradient: Tensor) -> dict[str, Codec]:
    """One for each of ``CODECS``."""
    first = Codec(Levels.uniform(4))
    adaptive, counts = fit(Statistics.measure(first, [gradient], first.layout((len(gradient),))), 4)
    return {
        "packed4": Codec(Levels.uniform(4), "fixed", norm="linf"),
        "packed8": Codec(Levels.uniform(8), "fixed", norm="linf"),
        "adaptive4": Codec(adaptive, counts=counts),
        "exponential4": Codec(Levels.exponential(4)),
        "uniform4_l2": Codec(Levels.uniform(4)),
        "uniform8": Codec(Levels.uniform(8), norm="linf"),
        "ternary": Codec(Levels.uniform(2), norm="linf"),
        "ternary_l2": Codec(Levels.uniform(2)),
        "gamma": Codec(adaptive, "elias_gamma"),
        "delta": Codec(adaptive, "elias_delta"),
        "omega": Codec(adaptive, "elias_omega"),
        "elias_runs": Codec(Levels.uniform(4), "elias_runs"),
    }


def check(codec: Codec, gradient: Tensor, payloads: list[Tensor]) -> None:
    """Decodes to what the specification drew, on the first coordinates; the mean is that of the vectors, on all."""
    first = gradient[:CHECKED]
    layout = codec.layout((len(first),))
    drawn = received(layout, quantize(codec.codebook, codec.norm, layout, key(0), first), codec.levels)
    whole = len(first) // codec.bucket_size * codec.bucket_size  # the buckets that a cut here leaves as they are
    vectors = [codec.decode_mean([payload]) for payload in payloads]
    require(torch.equal(vectors[0][:whole], drawn[:whole]))
    require(torch.equal(codec.decode_mean(payloads), sum(vectors[1:], vectors[0]).div_(len(payloads))))


def require(truth: bool) -> None:
    if not truth:
        raise SystemExit("what was decoded is not what was encoded: nothing is timed")


def key(rank: int) -> Key:
    return Key(seed=0, rank=rank, step=0)


def timed_codec(row: str, codec: Codec, gradient: Tensor, out: Tensor, vector: Tensor) -> list[Timed]:
    """Its calls, after a check; ``out`` and ``vector`` are there to be written."""
    payloads = [codec.encode(gradient, key(rank)) for rank in range(PAYLOADS)]
    check(codec, gradient, payloads)
    encode = partial(codec.encode, gradient, key(0), out)
    decode_one = partial(codec.decode_mean, payloads[:1], out=vector)
    decode_mean = partial(codec.decode_mean, payloads, out=vector)
    return [
        Timed(row, "encode", encode),
        Timed(row, "decode_one", decode_one),
        Timed(row, "decode_mean", decode_mean, vectors=PAYLOADS),
        Timed(row, "encode_two", encode, threads=2),
        Timed(row, "decode_two", decode_mean, threads=2, vectors=PAYLOADS),
    ]


def over_entropy(codec: Codec, gradient: Tensor) -> tuple[float, float]:
    """Percent by which a payload exceeds the entropy of its symbols: without the buckets' headers, and with them.

    The entropy is that of the magnitudes' shares in the first coordinates, and one bit for the sign of a non-zero.
    """
    first = gradient[:CHECKED]
    symbols = quantize(codec.codebook, codec.norm, codec.layout((len(first),)), key(0), first).symbols
    shares = torch.bincount(symbols.abs().long()).double() / len(first)
    entropy = len(first) * float(torch.special.entr(shares).sum() / math.log(2) + 1 - shares[0])
    bits = 8 * len(codec.encode(first, key(0)))
    headers = HEADER_BITS * -(-len(first) // codec.bucket_size)
    return 100 * ((bits - headers) / entropy - 1), 100 * (bits / entropy - 1)


# ---- peers -----------------------------------------------------------------------------------------------------------


def fp16(gradient: Tensor, codec: Codec) -> Peer:
    import horovod.torch as hvd

    half, context = hvd.Compression.fp16.compress(gradient)
    decode = partial(hvd.Compression.fp16.decompress, half, context)
    require(torch.equal(decode(), gradient.half().float()))
    return Peer(partial(hvd.Compression.fp16.compress, gradient), decode, 16)


def grace(gradient: Tensor, codec: Codec, levels: int = 7) -> Peer:
    """q = sign(v) (floor(x) + [random < x - floor(x)]), x = s |v| / ||v||, as GRACE sends it: norm and int8."""

    def encode():
        norm = gradient.norm()
        x = gradient.abs() * (levels / norm)
        floor = x.floor()
        index = floor + (torch.rand_like(x) < x - floor).float()
        return norm, (index * gradient.sign()).to(torch.int8)

    def decode(norm, symbols):
        return symbols.float() * (norm / levels)

    norm, symbols = encode()
    require(bool((decode(norm, symbols) - gradient).abs().max() <= 1.0001 * norm / levels))  # a level, and rounding
    return Peer(encode, partial(decode, norm, symbols), 8)


def packed_symbols(gradient: Tensor, codec: Codec) -> bytes:
    """What the fixed coder makes of the adaptive symbols: two to a byte, between the lengths and the checksum."""
    payload = Codec(codec.levels, "fixed").encode(gradient, key(0))
    return bytes(payload[-4 - (len(gradient) + 1) // 2 : -4].numpy())


def zstd(gradient: Tensor, codec: Codec) -> Peer:
    import zstandard

    packed = packed_symbols(gradient, codec)
    encode = partial(zstandard.ZstdCompressor(level=1).compress, packed)
    compressed = encode()
    decode = partial(zstandard.ZstdDecompressor().decompress, compressed)
    require(decode() == packed)
    return Peer(encode, decode, 8 * len(compressed) / len(gradient))


def constriction(gradient: Tensor, codec: Codec) -> Peer:
    import numpy as np
    from constriction import stream

    packed = np.frombuffer(packed_symbols(gradient, codec), np.uint8)
    symbols = np.stack((packed & 15, packed >> 4), axis=1).reshape(-1)[: len(gradient)].astype(np.int32)
    shares = stream.model.Categorical(np.bincount(symbols, minlength=15) / len(symbols), perfect=False)

    def encode():
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(symbols, shares)
        return coder.get_compressed()

    def decode(words):
        return stream.stack.AnsCoder(words).decode(shares, len(symbols))

    words = encode()
    require(np.array_equal(decode(words), symbols))
    return Peer(encode, partial(decode, words), 32 * len(words) / len(symbols))


def peers(gradient: Tensor, codec: Codec) -> dict[str, Peer]:
    """Those that are installed; a sentence about each of the others."""
    makers, found = {"fp16": fp16, "grace": grace, "zstd": zstd, "constriction": constriction}, {}
    for row, make in makers.items():
        if row in NEEDS and importlib.util.find_spec(NEEDS[row]) is None:
            print(f"{NEEDS[row]} is not installed, its row is left out (pip install 'hvd_qgenx[benchmarks]')")
        else:
            found[row] = make(gradient, codec)
    return found


# ---- time ------------------------------------------------------------------------------------------------------------


def at_once(pool: ThreadPoolExecutor, one: Callable, other: Callable) -> None:
    waiting = pool.submit(one)
    other()
    waiting.result()


def timed_memcpy(gradient: Tensor, vector: Tensor, pool: ThreadPoolExecutor) -> list[Timed]:
    """libc's memmove and torch's copy_, the faster of which counts; memmove by two threads, half each."""
    to, start, size = vector.data_ptr(), gradient.data_ptr(), 4 * len(gradient)
    half = size // 2

    halves = (partial(ctypes.memmove, to, start, half), partial(ctypes.memmove, to + half, start + half, size - half))
    return [
        Timed("memcpy", "memmove", partial(ctypes.memmove, to, start, size)),
        Timed("memcpy", "copy_", partial(vector.copy_, gradient)),
        Timed("memcpy", "two", partial(at_once, pool, *halves), threads=2),
    ]


@dataclass(frozen=True)
class Sample:
    """Seconds per gradient of one call, and the pace of the core around it."""

    seconds: float
    pace: float


def pace() -> float:
    """Seconds of a hash in the cache: a chain of instructions, each waiting for the one before."""
    begin = time.perf_counter()
    hashlib.sha256(HASHED).digest()
    return time.perf_counter() - begin


def sample(each: Timed) -> Sample:
    torch.set_num_threads(each.threads)
    before, begin = pace(), time.perf_counter()
    each.call()
    seconds = (time.perf_counter() - begin) / each.vectors
    return Sample(seconds, max(before, pace()))


def medians(calls: list[Timed], rounds: int) -> tuple[dict[tuple[str, str], float], float]:
    """Seconds per gradient of every call, at the core's full pace, and how many times slower the median sample was.

    A shared machine's cores slow down for seconds or minutes while its memory does not. Of every call's samples the
    third with the best paces counts; a first round does not.
    """
    samples: dict[tuple[str, str], list[Sample]] = {(each.row, each.figure): [] for each in calls}
    gc.disable()
    for _ in range(1 + rounds):
        for each in calls:
            samples[each.row, each.figure].append(sample(each))
    gc.enable()
    torch.set_num_threads(1)
    paces = [one.pace for found in samples.values() for one in found[1:]]
    times = {}
    for name, found in samples.items():
        best = sorted(found[1:], key=lambda one: one.pace)[: -(-rounds // 3)]
        times[name] = statistics.median(one.seconds for one in best)
    return times, statistics.median(paces) / min(paces)


def timed_two_calls(codec: Codec, gradient: Tensor, pool: ThreadPoolExecutor) -> list[Timed]:
    """Two calls that share nothing, each by one thread: what two threads can gain at most on these cores."""
    gradients, payload = [gradient, gradient.clone()], codec.encode(gradient, key(0))
    outs = [torch.ones(codec.bound(len(gradient)), dtype=torch.uint8) for _ in gradients]
    vectors = [torch.ones_like(gradient) for _ in gradients]
    encodes = [partial(codec.encode, *each) for each in zip(gradients, (key(0), key(1)), outs, strict=True)]
    decodes = [partial(codec.decode_mean, [payload] * PAYLOADS, out=vector) for vector in vectors]
    return [
        Timed("two_calls", "encode_two", partial(at_once, pool, *encodes), vectors=2),
        Timed("two_calls", "decode_two", partial(at_once, pool, *decodes), vectors=2 * PAYLOADS),
    ]


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(call: str, given: bool, gradient: Tensor) -> float:
    """Bytes beyond those there before, over the gradient's; run in a process of its own, see ``start_memory``.

    The kernel's own peak, set back before the call: ru_maxrss would begin at the peak of the parent process.
    """
    codec = codecs(gradient)["adaptive4"]
    payloads = [codec.encode(gradient, key(rank)) for rank in range(PAYLOADS)]
    vector = torch.ones(len(gradient)) if given else None
    out = torch.ones(codec.bound(len(gradient)), dtype=torch.uint8) if given else None
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    if call == "encode":
        codec.encode(gradient, key(0), out)
    else:
        codec.decode_mean(payloads, out=vector)
    return (_status("VmHWM") - before) / (4 * len(gradient))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def start_memory(call: str, given: bool, source: list[str]) -> subprocess.Popen:
    """A process that prints ``peak_memory``."""
    command = [sys.executable, __file__, "--memory", call, *(["--out"] if given else []), *source]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# ---- figures ---------------------------------------------------------------------------------------------------------


def figure(row: str, name: str, value: float, unit: str, seconds: float | None = None) -> dict:
    """A row of the CSV."""
    milliseconds = "" if seconds is None else round(1000 * seconds, 4)
    return {"row": row, "figure": name, "value": round(value, 4), "unit": unit, "milliseconds": milliseconds}


def memcpy_figures(times: dict, size: int) -> tuple[list[dict], float]:
    """And the seconds of the faster memcpy."""
    way = min(("memmove", "copy_"), key=lambda name: times["memcpy", name])
    best, two = times["memcpy", way], times["memcpy", "two"]
    gain = times["memcpy", "memmove"] / two
    return [figure("memcpy", way, size / best / 1e9, "GB/s", best), figure("memcpy", "two", gain, "times", two)], best


def speed_figures(row: str, times: dict, memcpy: float, gain_of_memcpy: float) -> list[dict]:
    """Speeds in units of a memcpy's; decode is the slower of one payload and of each of several that are added."""
    one, mean = times[row, "decode_one"], times[row, "decode_mean"]
    unit, base = ("times memcpy's", gain_of_memcpy) if row in PACKED else ("times", 1.0)
    found = [(name, times[row, name]) for name in ("encode", "decode_one", "decode_mean")]
    found.append(("decode", max(one, mean)))
    gains = [("encode_two", times[row, "encode"]), ("decode_two", mean)]
    return [figure(row, name, memcpy / seconds, "memcpy", seconds) for name, seconds in found] + [
        figure(row, name, alone / times[row, name] / base, unit, times[row, name]) for name, alone in gains
    ]


def size_figures(row: str, codec: Codec, gradient: Tensor) -> list[dict]:
    bits = 8 * len(codec.encode(gradient, key(0))) / len(gradient)
    found = [figure(row, "bits", bits, "bits per coordinate")]
    if row in OVERHEADS:
        without, with_headers = over_entropy(codec, gradient)
        found.append(figure(row, "over_entropy", without, "%"))
        found.append(figure(row, "over_entropy_with_headers", with_headers, "%"))
    return found


def peer_figures(row: str, peer: Peer, times: dict, memcpy: float) -> list[dict]:
    speeds = [figure(row, name, memcpy / times[row, name], "memcpy", times[row, name]) for name in ("encode", "decode")]
    return [*speeds, figure(row, "bits", peer.bits, "bits per coordinate")]


def two_calls_figures(times: dict) -> list[dict]:
    """How many times faster two calls at once are than one after another."""
    alone = {"encode_two": times["adaptive4", "encode"], "decode_two": times["adaptive4", "decode_mean"]}
    found = ((name, times["two_calls", name]) for name in alone)
    return [figure("two_calls", name, alone[name] / seconds, "times", seconds) for name, seconds in found]


def grace_figures(times: dict) -> list[dict]:
    """How many times faster the adaptive codec is."""
    ours = {"encode": times["adaptive4", "encode"]}
    ours["decode"] = max(times["adaptive4", "decode_one"], times["adaptive4", "decode_mean"])
    return [figure("over_grace", name, times["grace", name] / ours[name], "times") for name in ours]


def memory_figures(source: list[str]) -> list[dict]:
    """In four processes at once, before anything is timed."""
    running = {
        (row, name): start_memory(call, row == "memory_out", source)
        for row in ("memory_out", "memory")
        for name, call in (("encode", "encode"), ("decode", "decode_mean"))
    }
    printed = {place: process.communicate()[0] for place, process in running.items()}
    return [figure(row, name, float(text), "gradients") for (row, name), text in printed.items()]


def measure(gradient: Tensor, rounds: int, source: list[str]) -> list[dict]:
    """All rows of the CSV."""
    found = memory_figures(source)
    ours, vector = codecs(gradient), torch.ones_like(gradient)
    out = torch.ones(max(codec.bound(len(gradient)) for codec in ours.values()), dtype=torch.uint8)
    theirs = peers(gradient, ours["adaptive4"])
    with ThreadPoolExecutor(1) as pool:
        calls = timed_memcpy(gradient, vector, pool)
        for row, codec in ours.items():
            calls += timed_codec(row, codec, gradient, out, vector)
        calls += timed_two_calls(ours["adaptive4"], gradient, pool)
        for row, peer in theirs.items():
            calls += [Timed(row, "encode", peer.encode), Timed(row, "decode", peer.decode)]
        times, slowness = medians(calls, rounds)
    rows, memcpy = memcpy_figures(times, 4 * len(gradient))
    rows.append(figure("core", "slowness", slowness, "times"))
    for row, codec in ours.items():
        rows += speed_figures(row, times, memcpy, rows[1]["value"]) + size_figures(row, codec, gradient)
    for row, peer in theirs.items():
        rows += peer_figures(row, peer, times, memcpy)
    everything = rows + two_calls_figures(times) + grace_figures(times) + found
    return [{**about(), "coordinates": len(gradient), "rounds": rounds, **row} for row in everything]


def about() -> dict:
    """Commit, date, device with its processor's name, and the codec's backend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    here = provenance()
    return {**here, "device": ", ".join([here["device"], *names[:1]]), "backend": hvd_qgenx.backend}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def write(rows: list[dict], folder: Path) -> None:
    """One run, one file: ratios of different runs do not compare."""
    with open(folder / "codec_speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read(folder: Path = RESULTS) -> dict[tuple[str, str], dict]:
    with open(folder / "codec_speed.csv", newline="") as file:
        return {(row["row"], row["figure"]): row for row in csv.DictReader(file)}


def table(folder: Path = RESULTS) -> str:
    """All figures as Markdown."""
    rows = read(folder)
    memcpy = ["32", "1", "1", _cell(rows, "memcpy", "two"), "", ""]
    return _markdown(rows, {**CODECS, **PEERS, **OTHERS}, SHOWN, [[_memcpy_label(rows), *memcpy]])


def _markdown(rows: dict, labels: dict[str, str], shown: dict[str, str], lines: list[list[str]]) -> str:
    """A line for each label whose row has one of the figures in ``shown``, after ``lines``."""
    found = {row: [_cell(rows, row, name) for name in shown] for row in labels}
    lines = [["", *shown.values()], *lines, *([labels[row], *cells] for row, cells in found.items() if any(cells))]
    head, *body = (" ".join(f"| {cell}" if cell else "|" for cell in line) + " |" for line in lines)
    return "\n".join([head, "|---" * (1 + len(shown)) + "|", *body])


def _memcpy_label(rows: dict) -> str:
    way = "memmove" if ("memcpy", "memmove") in rows else "copy_"
    row = rows["memcpy", way]
    return f"memcpy by {way}, {4 * int(row['coordinates']) / 2**20:.3g} MiB: {float(row['value']):.1f} GB/s"


def _cell(rows: dict, row: str, name: str) -> str:
    if (row, name) not in rows:
        return ""
    text = f"{float(rows[row, name]['value']):.2f}"
    if name == "over_entropy":
        text += f"; {float(rows[row, name + '_with_headers']['value']):.2f} with headers"
    return text


def plot(folder: Path) -> None:
    """Bars of the speeds."""
    if importlib.util.find_spec("matplotlib") is None:
        return print("matplotlib is not installed, there is no plot (pip install 'hvd_qgenx[benchmarks]')")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, labels = read(folder), {**CODECS, **PEERS}
    shown = [row for row in labels if (row, "encode") in rows]
    figure_, axes = pyplot.subplots(1, 2, figsize=(11, 6), sharey=True)
    for axis, name, title in zip(axes, ("encode", "decode"), ("encode", "decode + add"), strict=True):
        _bars(axis, [rows[row, name] for row in shown])
        axis.set_xlabel(f"{title}, one core: speed in units of a memcpy's")
    axes[0].set_yticks(range(len(shown)), [labels[row].replace("`", "") for row in shown])
    axes[0].invert_yaxis()
    figure_.tight_layout()
    figure_.savefig(folder / "codec_speed.png", dpi=110)
    pyplot.close(figure_)


def _bars(axis, found: list[dict]) -> None:
    colours = ["#4477aa" if row["row"] in CODECS else "#bbbbbb" for row in found]
    axis.barh(range(len(found)), [float(row["value"]) for row in found], color=colours)
    axis.axvline(1, color="black", linewidth=0.8)


def load(flags) -> Tensor:
    if flags.gradient:
        return torch.load(flags.gradient, weights_only=True).detach().float().reshape(-1).contiguous()
    return torch.randn(flags.numel, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the rows in --results and end")
    parser.add_argument("--numel", type=int, default=2**24, help="coordinates of a Gaussian gradient")
    parser.add_argument("--gradient", help="a tensor saved by torch.save, to be taken instead")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    parser.add_argument("--memory", choices=["encode", "decode_mean"], help="print the peak memory of a call and end")
    parser.add_argument("--out", action="store_true", help="with --memory: out= is given")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.memory:
        print(peak_memory(flags.memory, flags.out, load(flags)))
    else:
        if not flags.table:
            source = ["--gradient", flags.gradient] if flags.gradient else ["--numel", str(flags.numel)]
            write(measure(load(flags), flags.rounds, source), flags.results)
            plot(flags.results)
        print(table(flags.results))
