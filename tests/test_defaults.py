"""The user's global defaults, of torch's types and devices, change nothing."""

import ast
from pathlib import Path

import pytest
import torch

import hvd_qgenx
from hvd_qgenx import Codec, Key, Levels

PACKAGE = Path(hvd_qgenx.__file__).parent

#: What makes a tensor of the default type or on the default device, unless told otherwise.
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "sparse_coo_tensor", "tensor", "zeros",
}  # fmt: skip
#: What has a type by itself: of its arguments, or int64.
TYPED = {"sparse_coo_tensor", "randperm"}


def _makers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        function = getattr(node, "func", None)
        if (
            isinstance(function, ast.Attribute)
            and ast.unparse(function.value) == "torch"
            and function.attr in FACTORIES
        ):
            yield function.attr, node.lineno, {keyword.arg for keyword in node.keywords}


def test_every_tensor_that_the_package_makes_names_its_type_and_device():
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for name, line, given in _makers(path):
            found += 1
            where = f"{path.relative_to(PACKAGE)}:{line}: torch.{name}"
            assert "device" in given, f"{where} takes the default device"
            assert name in TYPED or "dtype" in given, f"{where} takes the default type"
    assert found > 30, "the discovery found too little"


@pytest.fixture(params=["float64", "bfloat16", "float16", "meta"])
def default(request):
    if request.param == "meta":
        with torch.device("meta"):
            yield request.param
    else:
        torch.set_default_dtype(getattr(torch, request.param))
        yield request.param
        torch.set_default_dtype(torch.float32)


VECTOR = torch.randn(5000, generator=torch.Generator().manual_seed(0))
CODECS = [
    Codec(Levels.uniform(4)),
    Codec(Levels.exponential(3), coder="elias_omega", norm="linf"),
    Codec(Levels.uniform(8)),
]
PAYLOADS = [codec.encode(VECTOR, Key(1, 0, 0)) for codec in CODECS]


@pytest.mark.parametrize("index", range(3))
def test_payloads_means_and_parsed_headers_are_the_same(default, index):
    codec, payload = CODECS[index], PAYLOADS[index]
    assert torch.equal(codec.encode(VECTOR, Key(1, 0, 0)), payload)
    mean = codec.decode_mean([payload, payload], numel=5000)
    assert mean.dtype == torch.float32 and mean.device.type == "cpu" and codec.parse(payload).layout.numel == 5000


@pytest.mark.parametrize("form", ["histogram", "normal"])
def test_levels_are_fitted_alike(default, form):
    from hvd_qgenx.adaptation import Statistics, fit

    layout = CODECS[0].layout([5000])
    fitted = fit(Statistics.measure(CODECS[0], [VECTOR], layout, form), 4, 0.0)
    assert len(fitted[0].values) == 8
