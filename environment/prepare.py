"""Make `.venv` ready: the pinned packages, Horovod, and this package itself.

Run by the system's python3 with the standard library only (`make setup` does). It does
nothing when `.venv` was already made from the files as they are now. All that goes wrong
foreseeably is said in one sentence.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - before all that an older Python cannot read
    sys.exit("set-up: Python 3.10 or newer is needed; name one with 'make PYTHON=...'.")

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import time
from pathlib import Path

from build_horovod import (
    SetupError,
    cache_directory,
    duration,
    errors_in,
    find_compiler,
    run,
    run_logged,
    say,
)

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ready"
LOG = ROOT / ".cache" / "setup.log"
INPUTS = (
    "environment/constraints.txt",
    "environment/requirements.txt",
    "environment/build_horovod.py",
    "environment/prepare.py",
    "hvd_qgenx/__init__.py",
    "setup.cfg",
    "setup.py",
)
CORE = ROOT / "hvd_qgenx" / "csrc"
LIBRARY = ROOT / "hvd_qgenx" / "libqgenx.so"
NO_NETWORK = ("connection broken", "ConnectionError", "NameResolutionError")  # pip's words


def fingerprint():
    """A hash of all that `.venv` is made from: the input files, the Python, the place."""
    digest = hashlib.sha256(f"{sys.version}\n{sys.base_prefix}\n{ROOT}\n".encode())
    core = sorted(path for path in CORE.rglob("*") if path.is_file())
    for path in (*(ROOT / name for name in INPUTS), *core):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def is_ready():
    """Whether `.venv` works and was made from just these inputs."""
    return PYTHON.exists() and LIBRARY.exists() and STAMP.is_file() and STAMP.read_text() == fingerprint()


def check_python():
    """Complain of the parts of Python that distributions pack apart and that are not there."""
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        raise SetupError("Python's venv module is not complete; install it (on Debian the package python3-venv).")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SetupError(
            "Python's headers (Python.h) are missing; install them (the package python3-dev or python3-devel)."
        )


def check_compiler():
    """Complain of a C++ compiler that is missing, or too old for torch's headers."""
    compiler = find_compiler()
    program = "#include <concepts>\nint main() {}\n"
    command = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=program.encode(), capture_output=True).returncode:
        raise SetupError(
            f"The C++ compiler {compiler[0]} cannot compile C++20; install a newer one "
            "(GCC 10 or Clang 12 at least) or name one in CXX."
        )


def venv_is_usable():
    """Whether `.venv` has this Python's version and its scripts name their own place.

    They do not after the checkout was moved or copied: such a `.venv` is made anew.
    """
    ask = [PYTHON, "-c", "import sys; print(sys.version)"]
    try:
        version = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        return version == sys.version and str(VENV / "bin") in (VENV / "bin/pip").read_text()
    except OSError:
        return False


def make_venv():
    """Create `.venv`, over what is there if that is of no use."""
    if venv_is_usable():
        return
    say(f"Creating {VENV}")
    if not run_logged([sys.executable, "-m", "venv", "--clear", VENV], LOG):
        raise SetupError(f"{VENV} could not be created; {LOG} says:{errors_in(LOG)}")


def pip_install(what, *arguments):
    """Install with pip inside `.venv`; `what` names the packages when that fails."""
    pip = [PYTHON, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    if run_logged([*pip, *arguments], LOG, cwd=ROOT):
        return
    if any(sign in LOG.read_text(errors="replace") for sign in NO_NETWORK):
        raise SetupError(f"pip could not install {what}: no network? The log is {LOG}")
    raise SetupError(f"pip could not install {what}; {LOG} says:{errors_in(LOG)}")


def install_requirements():
    """Install the pinned packages, from binaries only: nothing but Horovod is compiled."""
    say("Installing the pinned packages of environment/constraints.txt (a few minutes when new)")
    pip_install(
        "the pinned packages (environment/requirements.txt)",
        "--only-binary=:all:",
        "--requirement=environment/requirements.txt",
        "--constraint=environment/constraints.txt",
    )


def install_horovod():
    """Install Horovod's wheel, built by `.venv`'s Python if the cache has none that fits."""
    build = [PYTHON, ROOT / "environment" / "build_horovod.py"]
    result = subprocess.run(build, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(1)  # the program has said why
    pip_install("Horovod's wheel", "--no-deps", "--force-reinstall", result.stdout.strip())


def install_package():
    """Compile the core and install this package so that the working tree itself is what is imported."""
    say("Compiling the package's core (a few seconds)")
    pip_install("this package", "--no-deps", "--no-build-isolation", "--editable", ROOT)


def prepare():
    """All the steps, and the stamp at their end."""
    started = time.monotonic()
    check_python()
    check_compiler()
    cache_directory()
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_bytes(b"")
    make_venv()
    STAMP.unlink(missing_ok=True)
    install_requirements()
    install_horovod()
    install_package()
    STAMP.write_text(fingerprint())
    say(f"The environment is ready ({duration(time.monotonic() - started)}).")


def main():
    """Prepare the environment unless it is ready."""
    os.environ.pop("PYTHONHOME", None)  # neither may lead .venv's Python elsewhere
    os.environ.pop("PYTHONPATH", None)
    if not is_ready():
        prepare()


if __name__ == "__main__":
    run(main)
