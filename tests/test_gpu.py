"""Kernels of a GPU without one: run by the CPU from the same text, and compiled by NVRTC where that is installed."""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import hvd_qgenx
from hvd_qgenx import Codec, Key, Levels, PayloadError, backends
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.cuda import driver, host, jobs, nvrtc
from hvd_qgenx.backends.cuda.device import DeviceError
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.payload import CHECKSUM

FOLDER = Path(__file__).parent / "gpu"
sys.path.insert(0, str(FOLDER))
import instructions  # noqa: E402
from cases import Case, compare, compare_damaged  # noqa: E402
from emulator import EXACT, emulated  # noqa: E402

sys.path.insert(0, str(FOLDER.parent / "golden"))
import vectors  # noqa: E402

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def core():
    return Compiled(best_path())


@pytest.mark.parametrize("name", ["Book", "EncodeJob", "GatherJob", "DecodeJob", "MeasureJob"])
def test_structures_are_as_large_in_python_as_in_the_kernels(folder, name):
    assert ctypes.sizeof(getattr(jobs, name)) == emulated(folder).device.library.emulated_size(name.encode())


def test_a_bucket_is_as_large_in_python_as_in_the_kernels(folder):
    assert jobs.BUCKET.itemsize == emulated(folder).device.library.emulated_size(b"Bucket")


def test_what_a_kernel_is_told_fits_its_parameters():
    assert max(map(ctypes.sizeof, (jobs.EncodeJob, jobs.DecodeJob, jobs.MeasureJob))) <= 4096


@pytest.mark.parametrize("order", [0, 12345, 67890])
def test_kernels_give_the_core_s_bytes_means_and_statistics(folder, core, order):
    for number in range(order % 7, order % 7 + 50):
        assert compare(Case(number), emulated(folder, order), core) == "", number


def test_damaged_payloads_are_refused_exactly_as_by_the_core(folder, core):
    found = [compare_damaged(Case(number), emulated(folder, 12345), core) for number in range(300)]
    assert [number for number, (wrong, _) in enumerate(found) if wrong] == []
    # The damage is not always damage: sums of both kinds prove that the test can see both.
    assert 50 < sum(refused for _, refused in found) < 290


@pytest.mark.parametrize("name", vectors.CASES)
def test_golden_vectors_are_the_same_bytes_and_values(folder, name):
    golden = torch.frombuffer(bytearray((FOLDER.parent / "golden" / f"{name}.bin").read_bytes()), dtype=torch.uint8)
    codec, _ = vectors.CASES[name]
    expected = codec.decode_mean([golden])
    with backends.force(emulated(folder)):
        assert torch.equal(vectors.encode(name), golden)
        assert torch.equal(codec.decode_mean([golden]), expected)


def test_payloads_that_are_cut_differently_or_bring_their_codebooks_have_the_core_s_mean(folder, core):
    one = Codec(Levels.uniform(4), bucket_size=64, min_numel=10)
    two = Codec(Levels.exponential(3), bucket_size=100, min_numel=50)
    sizes, vector = (7, 30, 0, 500), torch.randn(537)
    payloads = [
        codec.encode(vector, Key(0, rank, 0), sizes=sizes, inline=codec is two)
        for rank, codec in enumerate([one, one, two, one])
    ]
    means = []
    for backend in (core, emulated(folder)):
        targets = [torch.ones(size) for size in sizes]
        backend.decode_mean(one.codebook, payloads, targets, [[0, 1, 2, 3], [0, -1, 2, 3], [0, 1, 2, 3], [-1, 1, 2, 3]])
        means.append(torch.cat(targets))
    assert torch.equal(*means)


def _frequent(levels):
    """What the kernels of few levels take."""
    return Codec(levels, "huffman", counts=tuple(2 ** (8 - m) for m in range(levels.num_levels + 1)))


@pytest.mark.parametrize("size", [1, 31, 64, 1000, 1024, 3000])
@pytest.mark.parametrize("coder", ["huffman", "elias_gamma"])
def test_minus_zero_is_not_negative_even_where_a_norm_makes_several_levels_zero(folder, core, coder, size):
    codec = Codec(Levels((0.0, 0.001, 0.002, 1.0)), coder, counts=(8, 4, 2, 1) if coder == "huffman" else None)
    vector = torch.full((size,), -0.0)
    vector[0] = 2.0**-143
    payloads, counts = [], []
    for backend in (core, emulated(folder)):
        layout, out = codec.layout([size]), torch.zeros(codec.bound(size), dtype=torch.uint8)
        drawn = backend.encode(codec.codebook, codec.norm, layout, Key(0, 0, 0), [vector], out, False)
        payloads.append(out[: drawn.size])
        counts.append(drawn.counts.tolist())
    # The bucket's zeros have index 2, but not those with which a kernel fills its registers behind it.
    assert torch.equal(*payloads) and counts[0] == counts[1] == [0, 0, min(size, 1024) - 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("coder", [coder for coder in CODERS if coder != "fixed"])
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4, 7])
def test_every_word_that_does_not_exist_is_refused_as_by_the_core(folder, core, coder, num_levels):
    """The last two bytes of a short code take every value."""
    codec = Codec(Levels(tuple(m / num_levels for m in range(num_levels + 1))), coder, bucket_size=6)
    vector = torch.tensor([1.0, -0.5, 0.3, -0.2, 0.1, 0.0])
    layout, out = codec.layout([6]), torch.zeros(codec.bound(6), dtype=torch.uint8)
    drawn = core.encode(codec.codebook, codec.norm, layout, Key(0, 0, 0), [vector], out, False)
    end = drawn.size - CHECKSUM.size
    found = []
    for backend in (core, emulated(folder)):
        changed = [_changed(out[: drawn.size], end - back, value) for back in (1, 2) for value in range(256)]
        found.append([_outcome(backend, codec, payload) for payload in changed])
    assert found[0] == found[1]


def _changed(payload, place, value):
    changed = payload.clone()
    changed[place] = value
    host.seal(changed, len(changed) - CHECKSUM.size)
    return changed


def _outcome(backend, codec, payload):
    target = torch.zeros(6)
    try:
        backend.decode_mean(codec.codebook, [payload], [target], None, 1.0)
    except PayloadError as error:
        return str(error)
    return target.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 31])
@pytest.mark.parametrize("scale", [2.0**-147, 2.0**-140, 2.0**-126, 1.0, 2.0**118])
def test_means_of_any_number_of_payloads_are_rounded_as_by_the_core(folder, core, count, scale):
    # Among subnormal numbers a mean can lie in the middle between two: what a product with 1 / count would miss.
    codec, vector = _frequent(Levels.uniform(4)), torch.randn(2000, generator=torch.Generator().manual_seed(0)) * scale
    payloads = [codec.encode(vector, Key(0, rank, 0)) for rank in range(count)]
    means = []
    for backend in (core, emulated(folder)):
        backend.decode_mean(codec.codebook, payloads, means_of := [torch.empty(2000)])
        means += means_of
    assert torch.equal(*means) and means[0].any()


@pytest.mark.parametrize(
    ("levels", "search"),
    [
        (Levels.uniform(4), "uniform"),
        (Levels.exponential(4), "few"),
        (Levels((0.0, 1e-5, 0.01, 0.011, 1.0)), "few"),
        (Levels((0.0, 0.0101, 0.01011, 1.0)), "any"),  # so close that they share a bin
        (Levels((0.0, 1e-7, 1e-6, 1.0)), "any"),
    ],
)
def test_levels_are_searched_by_bins_unless_two_lie_in_one(levels, search):
    tables = jobs.tables_of(_frequent(levels).codebook)
    assert tables.search == search
    assert tables.few


def test_bins_count_the_levels_in_lower_ones():
    bins = jobs.tables_of(_frequent(Levels((0.0, 1e-5, 0.01, 0.5, 1.0))).codebook).bins
    assert len(bins) == 400 and bins[0] == 0 and bins[-1] == 3 and sorted(bins) == list(bins)
    assert [int((bins == count).argmax()) for count in (1, 2, 3)] == [2, 170, 353]


def test_the_comparison_fails_if_products_and_sums_are_joined(folder, core):
    # What a compiler does that may contract: one rounding where the format has two.
    joined = emulated(folder, 0, ("-mfma", "-ffp-contract=fast", "-O3"))
    assert any(compare(Case(number), joined, core) for number in range(60))


@pytest.mark.slow
def test_sanitizers_find_nothing(folder):
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *EXACT)
    script = f"""
import sys, torch
sys.path.insert(0, {str(FOLDER)!r})
from pathlib import Path
from cases import Case, compare, compare_damaged
from emulator import emulated
from hvd_qgenx.backends.compiled import Compiled, best_path
ours, core = emulated(Path({str(folder)!r}), 0, {flags!r}), Compiled(best_path())
for number in range(5):
    assert not compare(Case(number), ours, core) and not compare_damaged(Case(number), ours, core)[0], number
"""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**_environment(), **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _environment():
    return {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}


# ---- the compiler ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def has_nvrtc():
    try:
        nvrtc.library()
    except DeviceError as error:
        pytest.skip(str(error))


@cache
def _compiled(architecture):
    """Once for all tests: it takes ten seconds."""
    return nvrtc.compile_for(architecture, "--ptxas-options=-v")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_and_the_frequent_ones_in_at_most_96_registers(has_nvrtc, architecture):
    log = _compiled(architecture)["ProgramLog"].decode()
    names, registers = re.findall(r"entry function '(\w+)'", log), re.findall(r"Used (\d+) registers", log)
    used = dict(zip(names, map(int, registers), strict=True))
    assert len(used) == 11 and set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    general = {"encode_any", "encode_wide", "decode_any", "decode_wide"}
    assert max(number for name, number in used.items() if name not in general) <= 96, used
    assert max(used.values()) <= 128, used


@pytest.mark.slow
def test_nothing_in_the_assembly_rounds_otherwise_than_named(has_nvrtc):
    strict = _compiled("sm_90")["PTX"].decode()
    assert not re.search(r"div\.full|\.approx|\.ftz|fma\.rn\.f32|mad\.f32", strict)
    # Nothing depends on the option: it only keeps a compiler from doing more.
    free = nvrtc.compile_for("sm_90", "--fmad=true")["PTX"].decode()
    assert strict.splitlines()[10:] == free.splitlines()[10:]


@pytest.mark.slow
def test_a_coordinate_takes_few_instructions(has_nvrtc):
    if (cuobjdump := shutil.which("cuobjdump")) is None:
        pytest.skip("cuobjdump is not installed")
    found = instructions.counts(cuobjdump)
    assert found["encode_few"] <= 80 and found["encode_uniform"] <= 80 and found["decode_few"] <= 103, found


def test_a_compilation_is_kept_and_a_damaged_one_is_made_again(has_nvrtc, tmp_path, monkeypatch):
    made = iter([b"first", b"anew"])
    monkeypatch.setattr(nvrtc, "compile_for", lambda architecture: {"CUBIN": next(made)})
    assert [nvrtc.compiled("sm_90", tmp_path), nvrtc.compiled("sm_90", tmp_path)] == [b"first", b"first"]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert nvrtc.compiled("sm_90", tmp_path) == b"anew"


def test_a_compiler_that_refuses_the_source_says_why(has_nvrtc, monkeypatch):
    monkeypatch.setattr(nvrtc, "source", lambda: {"kernels.cu": b"int kernel( {"})
    with pytest.raises(DeviceError, match="the kernels do not compile: .*error"):
        nvrtc.compile_for("sm_90")


# ---- the benchmark, whose measuring needs a device -------------------------------------------------------------------


@pytest.fixture
def gpu_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "benchmarks"))
    return importlib.import_module("gpu_speed")


def test_the_benchmark_s_check_passes_and_fails_as_the_kernels_do(folder, gpu_speed, monkeypatch, capsys):
    kernels = emulated(folder)
    gpu_speed.check(kernels, 10, 10)
    assert capsys.readouterr().out.startswith("10 cases and 10 damaged payloads, ")
    launch = kernels.device.launch

    def other_draws(name, job, *arguments):
        if name.startswith("encode"):
            job.key[0] ^= 1
        launch(name, job, *arguments)

    monkeypatch.setattr(kernels.device, "launch", other_draws)
    with pytest.raises(SystemExit, match="differs on the device: bytes"):
        gpu_speed.check(kernels, 10, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_ends_without_a_gpu_and_says_so(gpu_speed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", "--check", "--results", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit, match="2"):
        gpu_speed.main()
    assert "no kernels can run here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- what a user is told ---------------------------------------------------------------------------------------------


def test_kernels_are_taken_only_when_asked_for():
    assert hvd_qgenx.gpu_backend() == 'cpu: not asked for; Compression.qgenx(device="cuda") asks'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_warning_says_that_there_is_none(monkeypatch):
    monkeypatch.setattr(backends, "_against_gpu", backends._NOT_ASKED)
    with pytest.warns(RuntimeWarning, match="coded on the CPU: torch finds no CUDA device"):
        hvd_qgenx.Compression.qgenx(device="cuda")
    hvd_qgenx.Compression.qgenx(device="cuda")
    assert hvd_qgenx.gpu_backend() == "cpu: torch finds no CUDA device"


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 0), "compute capability is 7.0, below 7.5"), ((9, 0), "NVRTC is not installed")]
)
def test_an_old_card_and_an_absent_compiler_are_named(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    nvrtc.library.cache_clear()
    try:
        assert reason in driver.reason_against()
    finally:
        nvrtc.library.cache_clear()


def test_a_compiler_that_fails_is_a_reason_and_no_error(monkeypatch):
    def fail(architecture):
        raise DeviceError(f"the kernels do not compile: {architecture}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(nvrtc, "compiled", fail)
    assert driver.reason_against() == "the kernels do not compile: sm_90"


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device"):
        hvd_qgenx.Compression.qgenx(device="tpu")


def test_a_payload_that_only_a_device_refuses_is_not_blamed(folder, monkeypatch):
    codec, backend = Codec(Levels.uniform(4)), emulated(folder)
    payload = codec.encode(torch.randn(100), Key(0, 0, 0))
    launch = backend.device.launch

    def broken(kernel, job, *arguments):
        launch(kernel, job, *arguments)
        ctypes.c_int.from_address(job.wrong).value = 1

    monkeypatch.setattr(backend.device, "launch", broken)
    with pytest.raises(DeviceError, match="refuses a payload that the CPU can read"):
        backend.decode_mean(codec.codebook, [payload], [torch.zeros(100)])


def test_importing_the_package_loads_no_kernel_and_touches_no_device():
    script = (
        "import hvd_qgenx, sys, torch\n"
        "assert 'hvd_qgenx.backends.cuda' not in sys.modules and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=_environment())
