"""Every test of the codec, on the kernels of a GPU as the CPU runs them."""

import sys
from pathlib import Path

import pytest

from hvd_qgenx import backends

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulator import emulated
from test_codec import *  # noqa: F403
from test_segments import *  # noqa: F403


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return emulated(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def on_the_kernels(kernels):
    with backends.force(kernels):
        yield


@pytest.fixture
def path(on_the_kernels):
    """Where the tests of segments go through the core's paths, they go through the kernels here."""
    return "emulated"


# Of the core alone; tests/gpu/cases.py compares what an encoding measures with it, spoiled segments too.
del test_what_an_encoding_measures_is_what_receivers_will_see  # noqa: F821
# So long that threads which are emulated would take minutes.
del test_more_coordinates_than_int32_can_count, test_large_means_do_not_depend_on_threads  # noqa: F821
