"""A stand-in has the signature of what it stands for."""

import inspect

import horovod.torch as hvd
import pytest
import torch
from horovod.torch.optimizer import _DistributedOptimizer

import hvd_qgenx
from hvd_qgenx.extragradient import OptimizerView

STAND_INS = [
    hvd_qgenx.DistributedOptimizer,
    hvd_qgenx.ExtraGradient,
    hvd_qgenx.ExtraAdam,
    hvd_qgenx.ExtraSGD,
    hvd_qgenx.QGenX,
    OptimizerView,
]


def _parameters(function):
    return [(p.name, p.kind) for p in inspect.signature(inspect.unwrap(function)).parameters.values()]


def _overridden(cls):
    """The public methods of torch.optim.Optimizer that a class has of its own."""
    for name, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction):
        if not name.startswith("_") and getattr(cls, name) is not method:
            yield name, method


def test_methods_have_the_parameters_of_torchs_optimizer():
    found = 0
    for cls in STAND_INS:
        for name, method in _overridden(cls):
            assert _parameters(getattr(cls, name)) == _parameters(method), f"{cls.__name__}.{name}"
            found += 1
    assert found >= 15, "the discovery found too little"


def test_the_wrapper_has_horovods_methods_with_their_parameters():
    """All public ones of Horovod's own class; zero_grad and load_state_dict have those of torch's, see above."""
    own = vars(_DistributedOptimizer).items()
    methods = {name: f for name, f in own if inspect.isfunction(f) and not name.startswith("_")}
    for name in ("zero_grad", "load_state_dict"):
        del methods[name]
    for name, method in methods.items():
        assert _parameters(getattr(hvd_qgenx.DistributedOptimizer, name)) == _parameters(method), name
    assert set(methods) == {"synchronize", "skip_synchronize", "step", "set_backward_passes_per_step"}


def test_the_wrapper_takes_every_keyword_of_horovods_and_exchange():
    theirs = inspect.signature(hvd.DistributedOptimizer).parameters
    ours = inspect.signature(hvd_qgenx.DistributedOptimizer).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    own = ["exchange", "overlap", "hierarchical", "name", "timeout", "check_replicas", "process_group"]
    assert list(ours)[len(theirs) :] == own
    assert ours["process_set"].default is None, "the global one, which is not to be had without Horovod"
    for name, parameter in theirs.items():
        if name not in ("compression", "process_set"):
            assert ours[name].default == parameter.default, name


def test_the_compressor_takes_the_arguments_of_the_contract():
    names = list(inspect.signature(hvd_qgenx.Compression.qgenx.__call__).parameters)
    assert names == [
        "bits",
        "levels",
        "coder",
        "norm",
        "bucket_size",
        "rounding",
        "min_numel",
        "adapt_at",
        "adapt_every",
        "seed",
        "named_parameters",
        "process_set",
        "nonfinite",
        "statistics",
        "rate_weight",
        "name",
        "device",
    ]


def test_the_chooser_takes_of_them_what_it_can_pass_on():
    names = list(inspect.signature(hvd_qgenx.Compression.auto.__call__).parameters)
    assert names == ["bits", "seed", "named_parameters", "process_set", "nonfinite"]
    qgenx = inspect.signature(hvd_qgenx.Compression.qgenx.__call__).parameters
    auto = inspect.signature(hvd_qgenx.Compression.auto.__call__).parameters
    assert all(auto[name].default == qgenx[name].default for name in names[1:])


def test_the_probe_takes_one_of_three_sizes():
    parameters = inspect.signature(hvd_qgenx.probe).parameters
    assert list(parameters)[:3] == ["numel", "sizes", "model"]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [9]}, "bits must be an integer between 2 and 8, got 9"),
        ({"bits": 4}, "bits must be a sequence of integers"),
        ({"nonfinite": "zero"}, "nonfinite must be one of 'nan', 'raise'"),
        ({"seed": -1}, "seed must be an integer between 0"),
        ({"process_set": 3}, "process_set must be a horovod.torch.ProcessSet"),
        ({"named_parameters": [1]}, "named_parameters must be"),
    ],
)
def test_a_wrong_argument_of_the_chooser_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        hvd_qgenx.Compression.auto(**options)


def test_compressors_have_horovods_interface():
    for compressor in (hvd_qgenx.Compression.none, hvd_qgenx.Compression.fp16, hvd_qgenx.Compression.auto):
        theirs = hvd.Compression.none
        assert _parameters(compressor.compress) == _parameters(theirs.compress)
        assert _parameters(compressor.decompress) == _parameters(theirs.decompress)


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "ring"}, "exchange must be one of 'auto', 'allgather', 'two_phase', got 'ring'"),
        ({"backward_passes_per_step": 0}, "backward_passes_per_step must be an integer at least 1"),
        ({"gradient_predivide_factor": -1.0}, "gradient_predivide_factor must be a positive number"),
        ({"gradient_predivide_factor": 2.0, "op": hvd.Sum}, "gradient_predivide_factor must be 1 unless"),
        ({"op": hvd.Max}, "op must be hvd.Average or hvd.Sum"),
        ({"num_groups": -1}, "num_groups must be"),
        ({"named_parameters": [1]}, "named_parameters must be"),
        ({"named_parameters": []}, "must name every parameter"),
        ({"compression": "qgenx"}, "compression must be one of"),
        ({"process_set": "all"}, "process_set must be a horovod.torch.ProcessSet"),
        ({"overlap": 1}, "overlap must be a bool"),
        ({"hierarchical": "hosts"}, "hierarchical must be a bool or two process sets"),
        ({"hierarchical": (1, 2)}, "process_set must be a horovod.torch.ProcessSet, got 1"),
        ({"hierarchical": True}, "hierarchical needs Compression.qgenx"),
        ({"sparse_as_dense": "no"}, "sparse_as_dense must be a bool"),
        ({"named_parameters": 5}, "named_parameters must be"),
        (
            {"compression": hvd_qgenx.Compression.qgenx(process_set=hvd.ProcessSet([0, 1]))},
            "process_set must be the same for the optimizer and its compression",
        ),
    ],
)
def test_a_wrong_argument_is_named_when_the_wrapper_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        hvd_qgenx.DistributedOptimizer(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1), **options)


def test_two_networks_with_equal_names_are_told_apart_or_refused():
    networks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    optimizer = torch.optim.SGD([p for network in networks for p in network.parameters()], lr=0.1)
    pairs = [pair for network in networks for pair in network.named_parameters()]
    with pytest.raises(ValueError, match="unique names, repeated: bias, weight"):
        hvd_qgenx.DistributedOptimizer(optimizer, pairs)


def test_extrapolation_on_a_plain_optimizer_says_what_to_do():
    optimizer = hvd_qgenx.DistributedOptimizer(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1))
    with pytest.raises(AttributeError, match="wrap it in ExtraGradient"):
        optimizer.extrapolation()


def test_one_process_alone_sends_nothing_and_rounds_nothing():
    p = torch.zeros(5000, requires_grad=True)
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD([p], lr=1.0), compression=hvd_qgenx.Compression.qgenx(bits=2)
    )
    p.grad = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(p.detach(), -p.grad) and optimizer.communication.bytes_sent == 0


@pytest.mark.parametrize(
    "wrap", [hvd.DistributedOptimizer, lambda optimizer: hvd_qgenx.DistributedOptimizer(optimizer)]
)
def test_what_is_distributed_already_is_refused(wrap):
    with pytest.raises(ValueError, match="optimizer must not be distributed already"):
        hvd_qgenx.DistributedOptimizer(wrap(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)))


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="optimizer must not be LBFGS"):
        hvd_qgenx.DistributedOptimizer(torch.optim.LBFGS([torch.zeros(2, requires_grad=True)]))
