"""Kernels from source to machine code, at run time: NVRTC, which torch's CUDA builds bring, and a cache of its results.

A result is kept by the hash of the source, the options, the compiler's version and the architecture.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path

from hvd_qgenx.backends.cuda.device import DeviceError

#: Nothing is left to them: every operation that rounds is named. They only keep a compiler from doing more.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_MAJORS = (13, 12)
_DIGEST = hashlib.sha256().digest_size


@cache
def source() -> dict[str, bytes]:
    """The files of csrc/gpu by their names."""
    folder = resources.files("hvd_qgenx") / "csrc" / "gpu"
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=lambda file: file.name)}


def _candidates() -> Iterator[str]:
    """Where the library may be: beside what is loaded, or in the wheels that CUDA builds of torch require."""
    yield from (f"libnvrtc.so.{major}" for major in _MAJORS)
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for major in _MAJORS:
            yield from map(str, sorted(Path(root).glob(f"*/lib/libnvrtc.so.{major}")))


@cache
def library() -> ctypes.CDLL:
    """NVRTC; raises DeviceError where there is none."""
    for name in _candidates():
        try:
            # What it opens by itself lies beside it, where the loader need not look.
            for part in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else []:
                ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.nvrtcGetErrorString.restype = ctypes.c_char_p
        return found
    raise DeviceError("NVRTC is not installed: CUDA builds of torch bring it, or the package nvidia-cuda-nvrtc")


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compiled(architecture: str, folder: Path | None = None) -> bytes:
    """Machine code for an architecture such as "sm_90", from the cache if it is there.

    Args:
        architecture: of a device.
        folder: of the cache; None is the user's.
    """
    path = (folder or _user_folder()) / f"{_key(architecture)}.cubin"
    if (kept := _read(path)) is None:
        kept = compile_for(architecture)["CUBIN"]
        _write(path, kept)
    return kept


def compile_for(architecture: str, *options: str) -> dict[str, bytes]:
    """ "CUBIN", "PTX" and the "ProgramLog" of a compilation; raises DeviceError with the compiler's first error."""
    files = dict(source())
    main, program = files.pop("kernels.cu"), ctypes.c_void_p()
    strings = ctypes.c_char_p * len(files)
    _call(
        "nvrtcCreateProgram", ctypes.byref(program), main, b"kernels.cu", len(files), strings(*files.values()),
        strings(*map(str.encode, files)),
    )  # fmt: skip
    try:
        return _compile(program, [*OPTIONS, *options, f"--gpu-architecture={architecture}"])
    finally:
        library().nvrtcDestroyProgram(ctypes.byref(program))


def _compile(program: ctypes.c_void_p, options: list[str]) -> dict[str, bytes]:
    array = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    status = library().nvrtcCompileProgram(program, len(options), array)
    log = _fetch(program, "ProgramLog").rstrip(b"\0")
    if status:
        lines = log.decode(errors="replace").splitlines()
        why = next((line for line in lines if "error" in line), library().nvrtcGetErrorString(status).decode())
        raise DeviceError(f"the kernels do not compile: {why}")
    return {"CUBIN": _fetch(program, "CUBIN"), "PTX": _fetch(program, "PTX"), "ProgramLog": log}


def _fetch(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, data)
    return data.raw


def _call(function: str, *arguments) -> None:
    if status := getattr(library(), function)(*arguments):
        raise DeviceError(f"{function}: {library().nvrtcGetErrorString(status).decode()}")


def _key(architecture: str) -> str:
    digest = hashlib.sha256(repr((OPTIONS, version(), architecture, sorted(source().items()))).encode())
    return digest.hexdigest()


def _user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_qgenx"


def _read(path: Path) -> bytes | None:
    """What was kept, unless it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Keeps it, if that can be; several processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        return
