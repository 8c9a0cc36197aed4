"""The compiled library, the wheel's tag, and the page for a package index; everything else stands in setup.cfg."""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CORE = "hvd_qgenx/csrc"


class BuildLibrary(build_ext):
    """Makes hvd_qgenx/libqgenx.so. There is no Python in it: ctypes opens it, whatever the version of Python."""

    def get_ext_filename(self, fullname):
        return f"{Path(*fullname.split('.'))}.so"


class BuildWheel(bdist_wheel):
    """One wheel for a platform, not one for each version of Python on it."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return "py3", "none", platform


def index_page():
    """README.md as a package index can show it, which has none of the files that pictures and links lead to.

    Pictures go; a link becomes its text, and its path if that is another. No address of the source tree is known.
    """
    text = re.sub(r"!\[[^]]*\]\((?!https:)[^)]*\)\n*", "", Path("README.md").read_text(encoding="utf-8"))
    text = re.sub(r"\[([^]]*)\]\((?!https:)([^)]*)\)", lambda link: " ".join(dict.fromkeys(link.groups())), text)
    return f"{text}\nThe source distribution holds the files that are named here.\n"


setup(
    long_description=index_page(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
    ext_modules=[
        Extension(
            "hvd_qgenx.libqgenx",
            sources=sorted(glob(f"{CORE}/*.cpp")),
            depends=[*glob(f"{CORE}/*.h"), *glob(f"{CORE}/*.inl")],
            language="c++",
            # No contraction: a product and a sum are rounded one after the other, on every path.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
