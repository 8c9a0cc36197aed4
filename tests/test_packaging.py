"""Distributions: what a wheel and a source distribution hold, what an index shows, and that the tests run from them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

import hvd_qgenx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
GENERATED = ("PKG-INFO", "hvd_qgenx.egg-info/")
LEFT_OUT = (".git", ".venv", ".cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs", "shared")


def _run(command, cwd, **variables):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Distributions:
    """Files, and folders in which they lie unpacked."""

    wheel: Path
    source: Path
    package: Path
    tree: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution of this tree and the wheel that is built from it, as `make dist` builds them.

    Of a copy, without the list of files that an earlier build has left: the next one would add them to its own.
    """
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))
    (folder / "checkout" / "hvd_qgenx" / "stale.so").touch()
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "checkout"], folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "package")
    with tarfile.open(source) as archive:
        archive.extractall(folder)
    return Distributions(wheel, source, folder / "package", folder / source.name.removesuffix(".tar.gz"))


def _files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_wheel_serves_every_python_on_a_platform(built):
    _, version, _, tags = parse_wheel_filename(built.wheel.name)
    assert str(version) == hvd_qgenx.__version__
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    assert all(tag.platform != "any" for tag in tags)
    library = (built.package / "hvd_qgenx" / "libqgenx.so").read_bytes()
    assert b"qgenx_encode" in library and b"PyObject" not in library and b"PyInit" not in library


def test_the_wheel_holds_the_package_its_library_one_header_and_the_source_of_kernels(built):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hvd_qgenx").rglob("*.py")}
    others = {f"hvd_qgenx/{name}" for name in ("py.typed", "libqgenx.so", "csrc/qgenx.h")}
    # Compiled where they run.
    others |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "hvd_qgenx" / "csrc" / "gpu").iterdir()}
    assert {name for name in _files(built.package) if ".dist-info/" not in name} == modules | others


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a checkout knows which files are its own")
def test_the_source_distribution_is_the_whole_checkout(built):
    listed = _run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    there = {name for name in listed if (ROOT / name).is_file()}
    assert {name for name in _files(built.tree) if not name.startswith(GENERATED)} == there


def test_an_index_takes_both_and_shows_no_link_into_the_tree(built):
    _run([BIN / "twine", "check", "--strict", built.wheel, built.source], ROOT)
    (metadata,) = built.package.glob("*.dist-info/METADATA")
    shown = metadata.read_text()
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[([^]]*)\]", readme)
    assert pictures and not any(text in shown for text in pictures)
    # Where a link led is still to be read, since the source distribution has it.
    links = set(re.findall(r"(?<!!)\[[^]]*\]\((?!https:)([^)]*)\)", readme))
    assert links and all(link in shown for link in links) and not re.search(r"\]\((?!https:)", shown)


def test_the_version_stands_once():
    places = [*ROOT.glob("*.*"), *ROOT.glob("docs/*.md"), *(ROOT / "hvd_qgenx").rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in places if path.is_file() and _names_the_version(path)}
    assert found == {"hvd_qgenx/__init__.py", "CHANGELOG.md"}
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest.group(1) == hvd_qgenx.__version__


def _names_the_version(path):
    return bool(re.search(rf"(?<![\d.]){re.escape(hvd_qgenx.__version__)}(?![\d.]*\d)", path.read_text()))


def test_tests_of_the_source_distribution_run_against_the_wheel(built):
    variables = {"PYTHONPATH": str(built.package), "HYPOTHESIS_STORAGE_DIRECTORY": str(built.tree / "hypothesis")}
    where = "import hvd_qgenx; print(hvd_qgenx.__file__, hvd_qgenx.backend)"
    found, backend = _run([sys.executable, "-c", where], built.tree.parent, **variables).split()
    assert Path(found).is_relative_to(built.package) and backend != "specification"
    golden = "tests/test_payload.py::test_golden_vectors_encode_to_the_recorded_bytes"
    files = [golden, "tests/test_imports.py", "tests/test_readme.py", "tests/test_train_models.py"]
    # The program, not `python -m pytest`, which would put the tree, without a library, before the wheel.
    output = _run([BIN / "pytest", "-q", "-m", "not slow", *files], built.tree, **variables)
    assert re.search(r"\d+ passed", output) and "skipped" not in output
