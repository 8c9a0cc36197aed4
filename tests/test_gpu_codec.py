"""Every test of the codec and of segments, on a GPU as the CPU plays it: with kernels, and without."""

import sys
from pathlib import Path

import pytest

from hvd_qgenx import backends
from hvd_qgenx.backends.cuda.staging import Staged

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulator import emulated
from late import Prompt
from test_codec import *  # noqa: F403
from test_segments import *  # noqa: F403


@pytest.fixture(scope="module", params=["emulated", "staged"])
def backend(request, tmp_path_factory):
    return Staged(Prompt()) if request.param == "staged" else emulated(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def on_the_device(backend):
    with backends.force(backend):
        yield


@pytest.fixture
def path(on_the_device):
    """Where the tests of segments go through the core's paths, they go through the device here."""
    return "device"


# Of the core alone; tests/gpu/cases.py compares what an encoding measures with it, spoiled segments too.
del test_what_an_encoding_measures_is_what_receivers_will_see  # noqa: F821
# So long that threads which are emulated would take minutes.
del test_more_coordinates_than_int32_can_count, test_large_means_do_not_depend_on_threads  # noqa: F821
