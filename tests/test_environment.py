"""The set-up: Horovod as installed, its kept wheel, and what is said when something is missing."""

import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

import build_horovod
import prepare as prepare_program
import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

SUM_RANKS = """
import sys, torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([float(hvd.rank())]), op=hvd.Sum).item()
open(f"{sys.argv[1]}/{hvd.rank()}", "w").write(f"{hvd.size()} {total}")
"""


def environment(**changes):
    """The environment of a command as a user's shell gives it: .venv first, no outer make."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return {**env, "PATH": f"{BIN}{os.pathsep}{env['PATH']}", **changes}


def run(command, env, cwd=ROOT):
    """Run `command`, keeping what it prints."""
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(command, env=env, cwd=cwd, timeout=240, **quiet)


def assert_one_sentence(result, *words):
    """It failed with one line on standard error that has these words."""
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def installed_horovod():
    """The folder of the Horovod that this Python imports."""
    return Path(metadata.distribution("horovod").locate_file("horovod")).resolve()


# The plain command


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_plain_horovodrun(ranks, tmp_path):
    script = tmp_path / "sum_ranks.py"
    script.write_text(SUM_RANKS)
    answers = tmp_path / "answers"
    answers.mkdir()
    command = ["horovodrun", "-np", str(ranks), "python", str(script), str(answers)]
    result = run(command, environment(OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stdout + result.stderr
    expected = f"{ranks} {float(sum(range(ranks)))}"
    assert [(answers / str(rank)).read_text() for rank in range(ranks)] == [expected] * ranks
    assert len(list(answers.iterdir())) == ranks


def test_horovod_has_gloo_and_mpi():
    ask = "import horovod.torch as hvd; print(hvd.gloo_built(), hvd.mpi_built())"
    result = run([sys.executable, "-c", ask], environment())
    assert result.stdout.split() == ["True", "True"], result.stderr


# The libraries find each other from where they lie


@dataclasses.dataclass
class Dynamic:
    """The names in an ELF file's dynamic section: libraries needed, folders to search."""

    needed: list
    search: list


def read_dynamic(path):
    """Read the dynamic section of a 64-bit little-endian ELF file."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit little-endian ELF file"
    start, size, count = (
        struct.unpack_from("<Q", data, 0x28)[0],
        *struct.unpack_from("<HH", data, 0x3A),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    dynamic = next(header for header in headers if header[1] == 6)  # SHT_DYNAMIC
    strings = headers[dynamic[6]][4]
    found = {1: [], 15: [], 29: []}  # DT_NEEDED, DT_RPATH, DT_RUNPATH
    for tag, value in struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]]):
        if tag in found:
            end = data.index(b"\0", strings + value)
            found[tag].append(data[strings + value : end].decode())
    return Dynamic(found[1], ":".join(found[15] + found[29]).split(":"))


def test_search_paths_are_relative_to_the_library():
    libraries = list(installed_horovod().rglob("*.so"))
    assert libraries
    for library in libraries:
        dynamic = read_dynamic(library)
        assert all(folder.startswith("$ORIGIN/") for folder in dynamic.search), dynamic.search
        assert not any("/" in name for name in dynamic.needed), dynamic.needed


def kept_wheel():
    """The wheel that Horovod was installed from, as pip has recorded it."""
    record = metadata.distribution("horovod").read_text("direct_url.json")
    wheel = Path(unquote(urlparse(json.loads(record)["url"]).path)) if record else None
    if wheel is None or not wheel.is_file():
        pytest.skip("the wheel that Horovod was installed from is no longer kept")
    return wheel


def second_environment(folder):
    """A place laid out like another .venv: torch and MPI linked in, Horovod from its wheel."""
    here = installed_horovod().parent
    packages = folder / "lib" / here.parent.name / here.name
    packages.mkdir(parents=True)
    (packages / "torch").symlink_to(here / "torch")
    for entry in (here.parent.parent).iterdir():
        if entry.name != here.parent.name:
            (folder / "lib" / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    result = run([*pip, "--target", packages, kept_wheel()], environment())
    assert result.returncode == 0, result.stderr
    return packages


@pytest.mark.slow
def test_kept_wheel_works_in_another_place(tmp_path):
    packages = second_environment(tmp_path / "second")
    load = (
        "import ctypes, glob; ctypes.CDLL(glob.glob('horovod/torch/mpi_lib_v2*.so')[0]);"
        "import horovod.torch as hvd; hvd.init(); print(hvd.__file__, hvd.mpi_built())"
    )
    env = environment(PYTHONPATH=str(packages))
    env.pop("LD_LIBRARY_PATH", None)
    result = run([sys.executable, "-c", load], env, cwd=packages)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(packages / "horovod/torch/__init__.py"), "True"]


# The changes and the key


def test_a_change_that_does_not_apply_names_its_file(tmp_path):
    changed = build_horovod.CHANGES[-1]
    target = tmp_path / changed.file
    target.parent.mkdir(parents=True)
    target.write_text("another release of this file")
    with pytest.raises(build_horovod.SetupError, match=changed.file):
        build_horovod.apply_changes(tmp_path, [changed])
    with pytest.raises(build_horovod.SetupError, match=r"CMakeLists\.txt"):
        build_horovod.apply_changes(tmp_path)


def test_a_change_is_made_once(tmp_path):
    (tmp_path / "file").write_text("one two three")
    change = build_horovod.Change("file", "two", "2", "a digit is shorter")
    build_horovod.apply_changes(tmp_path, [change])
    assert (tmp_path / "file").read_text() == "one 2 three"


def test_every_change_has_its_reason():
    assert all(change.reason.endswith(".") for change in build_horovod.CHANGES)


def test_key_depends_on_every_input():
    inputs = build_horovod.key_inputs()
    expected = {"python", "platform", "torch", "mpi", "compiler", "flags", "changes", "sdist"}
    assert expected <= set(inputs)
    keys = {build_horovod.key({**inputs, name: "another"}) for name in inputs}
    assert len(keys | {build_horovod.key(inputs)}) == len(inputs) + 1
    assert build_horovod.key(build_horovod.key_inputs()) == build_horovod.key(inputs)


@pytest.mark.parametrize("name", ["CXXFLAGS", "LDFLAGS"])
def test_key_depends_on_the_callers_flags(name, monkeypatch):
    before = build_horovod.key(build_horovod.key_inputs())
    monkeypatch.setenv(name, "-Lanother")
    assert build_horovod.key(build_horovod.key_inputs()) != before


@pytest.mark.parametrize(("cuda", "expected"), [("None", ""), ("'13.0'", "/toolkit")])
def test_a_cuda_toolkit_counts_for_a_cuda_build_of_torch_alone(cuda, expected, monkeypatch):
    text = f"cuda: Optional[str] = {cuda}\n"
    monkeypatch.setattr(build_horovod, "torch_source", lambda name: text)
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    assert build_horovod.cuda_toolkit() == expected


def test_settings_the_key_does_not_know_do_not_reach_the_build(monkeypatch):
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setenv("CMAKE_GENERATOR", "Ninja")
    assert not {"HOROVOD_GPU_OPERATIONS", "CMAKE_GENERATOR"} & set(build_horovod.build_environment())


# The cache


def test_two_set_ups_at_once_build_one_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def slow_build(folder, log):
        built.append(folder)
        time.sleep(0.3)
        (folder / "horovod.whl").write_text("a wheel")

    found = []
    ensure = lambda: found.append(build_horovod.ensure_wheel({"a": 1}, slow_build))  # noqa: E731
    threads = [threading.Thread(target=ensure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(set(found)) == 1 and found[0].read_text() == "a wheel"
    assert found[0].is_relative_to(tmp_path / "hvd_qgenx")


def test_a_failed_build_is_never_taken_for_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def failing_build(folder, log):
        (folder / "horovod.whl").write_text("half a whe")
        raise build_horovod.SetupError("no")

    with pytest.raises(build_horovod.SetupError):
        build_horovod.ensure_wheel({"a": 1}, failing_build)
    wheel = build_horovod.ensure_wheel(
        {"a": 1}, lambda folder, log: (folder / "horovod.whl").write_text("a whole wheel")
    )
    assert wheel.read_text() == "a whole wheel"
    assert list(tmp_path.rglob("*.whl")) == [wheel]


def test_a_failed_compilation_shows_its_errors_and_names_its_log(tmp_path):
    (tmp_path / "setup.py").write_text("raise SystemExit('common.cc:1: error: no such thing')")
    log = tmp_path / "log"
    with pytest.raises(build_horovod.SetupError, match="no such thing") as caught:
        build_horovod.compile_wheel(tmp_path, tmp_path, log)
    assert str(log) in str(caught.value)


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build_horovod.SetupError, match="XDG_CACHE_HOME"):
        build_horovod.cache_directory()


def test_relative_cache_home_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_horovod.cache_directory() == tmp_path / ".cache" / "hvd_qgenx"


# What is missing is said in one sentence


@pytest.fixture
def checkout(tmp_path):
    """A second checkout without a .venv: what the set-up reads, and nothing else."""
    folder = tmp_path / "checkout"
    for name in ("environment", "hvd_qgenx/csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "setup.cfg", "setup.py", "hvd_qgenx/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def prepare(checkout, **changes):
    """Run the set-up program of `checkout` in a changed environment."""
    program = checkout / "environment" / "prepare.py"
    env = environment(XDG_CACHE_HOME=str(checkout / "cache"), **changes)
    return run([sys.executable, program], env, cwd=checkout)


def test_no_compiler(checkout):
    assert_one_sentence(prepare(checkout, PATH="", CXX=""), "no C++ compiler", "install")


def test_unknown_compiler_in_cxx(checkout):
    assert_one_sentence(prepare(checkout, CXX="no-such-compiler -O1"), "no-such-compiler", "CXX")


def test_compiler_that_is_too_old(checkout):
    old = checkout / "old-c++"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert_one_sentence(prepare(checkout, CXX=str(old)), "C++20", str(old))


@pytest.mark.slow
def test_no_network(checkout):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1", "PIP_NO_CACHE_DIR": "1"}
    cut_off = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    result = prepare(checkout, **nowhere, **cut_off)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "no network" in last and "pinned packages" in last and "setup.log" in last


def test_unknown_make_target():
    result = run(["make", "no-such-target"], environment())
    assert_one_sentence(result, "no-such-target", "make help")


def test_make_alone_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    result = run(["make"], environment())
    assert result.returncode == 0
    assert all(f"make {name} " in result.stdout for name in targets if name != "help")


# When set-up is done again


@pytest.fixture
def set_up(checkout, monkeypatch):
    """environment/prepare.py as it would run in `checkout`, where all seems to be made."""
    monkeypatch.setattr(prepare_program, "ROOT", checkout)
    monkeypatch.setattr(prepare_program, "PYTHON", Path(sys.executable))
    for name, file in {"CORE": "hvd_qgenx/csrc", "LIBRARY": "hvd_qgenx/libqgenx.so", "STAMP": "ready"}.items():
        monkeypatch.setattr(prepare_program, name, checkout / file)
    prepare_program.LIBRARY.touch()
    prepare_program.STAMP.write_text(prepare_program.fingerprint())
    assert prepare_program.is_ready()
    return prepare_program


@pytest.mark.parametrize("name", ["hvd_qgenx/csrc/qgenx.h", "hvd_qgenx/__init__.py", "setup.cfg", "setup.py"])
def test_a_change_of_what_is_compiled_is_noticed(set_up, name):
    with open(set_up.ROOT / name, "a") as file:
        file.write("\n")
    assert not set_up.is_ready()


def test_a_new_name_or_folder_in_the_core_is_noticed(set_up):
    (set_up.CORE / "qgenx.cpp").rename(set_up.CORE / "face.cpp")
    assert not set_up.is_ready()
    set_up.STAMP.write_text(set_up.fingerprint())
    (set_up.CORE / "more").mkdir()
    (set_up.CORE / "more" / "kernel.h").touch()
    assert not set_up.is_ready()


def test_a_library_that_is_gone_is_noticed(set_up):
    set_up.LIBRARY.unlink()
    assert not set_up.is_ready()


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="another environment than that of make setup")
def test_every_installed_package_is_pinned():
    lines = (ROOT / "environment" / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    # Not what setuptools brings for itself, which it adds to sys.path once something imports it.
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(package.metadata["Name"]) for package in found}
    assert installed - {"horovod", "hvd-qgenx"} <= pinned


# What make does


def planned(*arguments):
    """The commands that make would run, whatever an outer make was told."""
    env = {name: value for name, value in environment().items() if name not in ("ARGS", "TESTS")}
    return run(["make", "-n", *arguments], env).stdout


def test_make_test_runs_every_test_unless_told_which():
    for chosen in (
        '-n 2 --dist loadfile -m "not parallel"',
        "-n 2 --dist loadfile -m waiting",
        '-m "parallel and not waiting"',
    ):
        assert f"pytest {chosen} tests " in planned("test")
        assert f"pytest {chosen} tests/test_codec.py -x" in planned("test", "TESTS=tests/test_codec.py", "ARGS=-x")


def test_make_quick_leaves_out_what_is_parallel_or_slow():
    assert re.search(r'pytest -m "not parallel and not slow" tests -x$', planned("quick", "ARGS=-x"), re.M)


def test_make_clean_leaves_nothing_that_was_made_but_the_runs(checkout):
    before = {path for path in checkout.rglob("*") if path.is_file()}
    made = [".venv/bin/python", ".cache/setup.log", "build/x.o", "dist/x.whl", "x.egg-info/PKG-INFO"]
    made += ["hvd_qgenx/libqgenx.so", "hvd_qgenx/__pycache__/x.pyc"]
    for name in [*made, "runs/one/config.json"]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    assert run(["make", "clean"], environment(), cwd=checkout).returncode == 0
    assert {path for path in checkout.rglob("*") if path.is_file()} == before | {checkout / "runs/one/config.json"}
