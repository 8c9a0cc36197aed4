"""The compiled core; everything else stands in setup.cfg."""

from glob import glob

from setuptools import Extension, setup

CORE = "hvd_qgenx/csrc"
SOURCES = ("qgenx", "encode", "decode", "statistics", "payload", "layout", "code", "portable", "avx2")

setup(
    ext_modules=[
        Extension(
            "hvd_qgenx._core",
            sources=[f"{CORE}/{name}.cpp" for name in SOURCES],
            depends=[*glob(f"{CORE}/*.h"), *glob(f"{CORE}/*.inl")],
            language="c++",
            # No contraction: a product and a sum are rounded one after the other, on every path.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]
)
