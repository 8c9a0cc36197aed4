"""Our optimizers where torch's go: hooks, copies, assigned state, schedulers, averages, scalers, compilation."""

import copy
import io
import pickle

import horovod.torch as hvd
import pytest
import torch
from bilinear import game
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hvd_qgenx
from hvd_qgenx import Compression
from hvd_qgenx.extragradient import OptimizerView


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


def _wrapped(make):
    return lambda parameters: hvd_qgenx.DistributedOptimizer(make(parameters), compression=Compression.qgenx(bits=4))


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


MAKES = {
    "ExtraAdam": hvd_qgenx.ExtraAdam,
    "ExtraSGD from the past": lambda parameters: hvd_qgenx.ExtraSGD(parameters, lr=0.1, past=True),
    "ExtraGradient": lambda parameters: hvd_qgenx.ExtraGradient(torch.optim.RMSprop(parameters)),
    "QGenX": hvd_qgenx.QGenX,
    "a wrapped SGD": _wrapped(_sgd),
    "a wrapped ExtraAdam": _wrapped(hvd_qgenx.ExtraAdam),
    "a wrapped QGenX": _wrapped(hvd_qgenx.QGenX),
}


def _verbs(optimizer):
    is_wrapper = isinstance(optimizer, hvd_qgenx.DistributedOptimizer)
    extrapolates = hasattr(optimizer.optimizer if is_wrapper else optimizer, "extrapolation")
    return (optimizer.extrapolation, optimizer.step) if extrapolates else (optimizer.step,)


def _innermost(optimizer):
    while isinstance(optimizer, OptimizerView):
        optimizer = optimizer.optimizer
    return optimizer


def _layers(optimizer):
    layers = [optimizer]
    while isinstance(layers[-1], OptimizerView):
        layers.append(layers[-1].optimizer)
    return layers


def _model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def _iterate(model, optimizer, count=1):
    for _ in range(count):
        for half_step in _verbs(optimizer):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            half_step()


# ---- hooks -------------------------------------------------------------------------------------------------------


class _Calls:
    """How often each hook was called, since last asked."""

    def __init__(self, optimizer):
        self.counts = {}
        self.layers = _layers(optimizer)
        self.handles = [
            register_optimizer_step_pre_hook(self._count("global pre")),
            register_optimizer_step_post_hook(self._count("global post")),
        ]
        for index, layer in enumerate(self.layers):
            layer.register_step_pre_hook(self._count(f"pre {index}"))
            layer.register_step_post_hook(self._count(f"post {index}"))
            layer.register_state_dict_pre_hook(self._count(f"save pre {index}"))
            layer.register_state_dict_post_hook(self._count(f"save post {index}"))
            layer.register_load_state_dict_pre_hook(self._count(f"load pre {index}"))
            layer.register_load_state_dict_post_hook(self._count(f"load post {index}"))

    def _count(self, name):
        def hook(*arguments):
            self.counts[name] = self.counts.get(name, 0) + 1

        return hook

    def taken(self):
        counts, self.counts = self.counts, {}
        return counts

    def of_half_steps(self, count):
        names = [f"{kind} {index}" for kind in ("pre", "post") for index in range(len(self.layers))]
        return dict.fromkeys(["global pre", "global post", *names], count)


@pytest.fixture
def calls():
    made = []

    def watch(optimizer):
        made.append(_Calls(optimizer))
        return made[-1]

    yield watch
    for one in made:
        for handle in one.handles:
            handle.remove()


@pytest.mark.parametrize("make", MAKES)
def test_every_half_step_calls_every_step_hook_once(make, calls):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    watched = calls(optimizer)
    for half_step in _verbs(optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        half_step()
        assert watched.taken() == watched.of_half_steps(1)


@pytest.mark.parametrize("make", MAKES)
def test_a_closure_calls_every_step_hook_once_for_each_half_step(make, calls):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    watched = calls(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert watched.taken() == watched.of_half_steps(len(_verbs(optimizer)))


@pytest.mark.parametrize("make", MAKES)
def test_saving_and_loading_calls_their_hooks_once(make, calls):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    watched = calls(optimizer)
    state = optimizer.state_dict()
    layers = range(len(watched.layers))
    assert watched.taken() == {f"save {kind} {i}": 1 for kind in ("pre", "post") for i in layers}
    optimizer.load_state_dict(state)
    assert watched.taken() == {f"load {kind} {i}": 1 for kind in ("pre", "post") for i in layers}


@pytest.mark.parametrize("make", MAKES)
def test_hooks_may_change_what_passes(make):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda one, arguments, options: (arguments, seen.append(one) or options))
    optimizer.register_state_dict_post_hook(lambda one, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda one, state: {k: v for k, v in state.items() if k != "more"})
    _iterate(model, optimizer)
    assert seen == [optimizer] * len(_verbs(optimizer))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("make", MAKES)
def test_a_profile_has_one_range_for_each_half_step(make):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _iterate(model, optimizer, 3)
    ranges = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    name = f"Optimizer.step#{type(_innermost(optimizer)).__name__}.step"
    assert ranges == [name] * 3 * len(_verbs(optimizer))


# ---- copies and assigned state -----------------------------------------------------------------------------------


def _saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save": _saved}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("half_steps", [0, 1, 2, 3])
def test_a_copy_goes_on_as_the_original_does(copier, make, half_steps):
    model = _model()
    optimizer = MAKES[make](model.parameters())

    def go_on(model, optimizer, count, start):
        for index in range(start, start + count):
            verbs = _verbs(optimizer)
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            verbs[index % len(verbs)]()

    go_on(model, optimizer, half_steps, 0)
    other, its_optimizer = COPIERS[copier]((model, optimizer))
    go_on(model, optimizer, 4, half_steps)
    between = [p.detach().clone() for p in other.parameters()]
    go_on(other, its_optimizer, 4, half_steps)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(between, other.parameters(), strict=True)), "a copy of its own"


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize(
    "compression", [Compression.qgenx, Compression.auto, Compression.qgenx(bits=3, seed=5), Compression.auto(seed=2)]
)
def test_compressions_copy_with_their_settings_and_a_lock_of_their_own(copier, compression):
    other = COPIERS[copier](compression)
    assert repr(other) == repr(compression) and other.settings == compression.settings
    assert other is not compression and other._lock is not compression._lock


def test_a_copied_compressor_starts_with_the_same_state():
    compression = Compression.qgenx(bits=3, levels="uniform")
    compression.load_state_dict({**compression.state_dict(), "step": 7, "iteration": 4})
    other = pickle.loads(pickle.dumps(compression))
    assert other.state_dict() == compression.state_dict() and other.state_dict()["step"] == 7


def test_a_compression_travels_with_a_function_as_launchers_send_it():
    cloudpickle = pytest.importorskip("cloudpickle")
    compression = Compression.qgenx(bits=5)
    assert cloudpickle.loads(cloudpickle.dumps(lambda: compression.settings.bits))() == 5


@pytest.mark.parametrize("make", [make for make in MAKES if make != "QGenX"])
def test_assigned_state_acts_on_the_wrapped_optimizer(make):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    _iterate(model, optimizer, 2)
    inner = _innermost(optimizer)
    state, groups = copy.copy(inner.state), [dict(group, lr=0.5) for group in inner.param_groups]
    optimizer.state, optimizer.param_groups = type(state)(dict), groups
    assert inner.state == {} and inner.param_groups is groups
    optimizer.__setstate__({"state": state, "param_groups": groups[:1]})
    assert inner.state is state and inner.param_groups == groups[:1]
    _iterate(model, optimizer)


# ---- all of torch.optim ------------------------------------------------------------------------------------------

KINDS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "LBFGS", "SparseAdam")
)


def _options(kind, **options):
    accepted = kind.__init__.__code__.co_varnames
    return {name: value for name, value in {"lr": 0.05, **options}.items() if name in accepted}


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"differentiable": False}])
@pytest.mark.parametrize("name", KINDS)
def test_every_optimizer_of_torch_works_wrapped_and_extrapolates(name, options):
    """Muon takes matrices alone, so the model is one."""
    kind = getattr(torch.optim, name)
    options = _options(kind, **options)
    ends = []
    for wrap in (lambda o: o, lambda o: hvd_qgenx.DistributedOptimizer(o), hvd_qgenx.ExtraGradient):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=False)
        optimizer = wrap(kind(model.parameters(), **options))
        _iterate(model, optimizer, 3)
        ends.append(model.weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert ends[2].isfinite().all() and not torch.equal(ends[0], ends[2])


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("make", ["ExtraAdam", "a wrapped SGD", "a wrapped ExtraAdam"])
def test_schedulers_set_what_the_update_uses(scheduler, make):
    model, twin = _model(), _model()
    optimizer, other = MAKES[make](model.parameters()), _innermost(MAKES[make](twin.parameters()))
    made, expected = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](other)
    for _ in range(4):
        _iterate(model, optimizer)
        other.step()
        for one in (made, expected):
            one.step(1.0) if scheduler == "ReduceLROnPlateau" else one.step()
        assert (
            optimizer.param_groups[0]["lr"]
            == other.param_groups[0]["lr"]
            == _innermost(optimizer).param_groups[0]["lr"]
        )
    copy.deepcopy((model, optimizer))  # a scheduler leaves a method behind that no copy can take along


@pytest.mark.parametrize("make", MAKES)
def test_averaged_models_see_the_parameters(make):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    average, total = torch.optim.swa_utils.AveragedModel(model), torch.zeros(3, 4)
    for _ in range(3):
        _iterate(model, optimizer)
        average.update_parameters(model)
        total += model.weight.detach()
    # Running means round otherwise than a sum: float32.
    assert torch.allclose(average.module.weight, total / 3, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrap", [hvd_qgenx.ExtraGradient, lambda o: hvd_qgenx.DistributedOptimizer(o)])
def test_a_grad_scaler_unscales_what_the_update_uses(wrap, fused):
    ends = []
    for scale in (1.0, 2.0**10):
        model = _model()
        optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.1, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(2):
            for half_step in _verbs(optimizer):
                optimizer.zero_grad()
                scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
                if half_step == optimizer.step:
                    scaler.step(optimizer)
                else:  # which knows no other verb than step
                    scaler.unscale_(optimizer)
                    half_step()
                scaler.update()
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends), "a power of two scales without rounding"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", ["ExtraAdam", "QGenX", "a wrapped SGD", "a wrapped ExtraAdam"])
@pytest.mark.parametrize("compiled", ["model", "step", "half-steps"])
def test_compiled_models_and_steps_end_where_others_do(make, compiled):
    ends = []
    for compile_it in (False, True):
        torch._dynamo.reset()
        model = _model()
        optimizer = MAKES[make](model.parameters())
        forward = torch.compile(model, backend="eager") if compile_it and compiled == "model" else model
        half_steps = list(_verbs(optimizer))
        if compile_it and compiled != "model":
            first = 0 if compiled == "half-steps" else len(half_steps) - 1
            half_steps[first:] = [torch.compile(one, backend="eager") for one in half_steps[first:]]
        for _ in range(3):
            for half_step in half_steps:
                optimizer.zero_grad()
                forward(torch.ones(2, 4)).square().mean().backward()
                half_step()
        ends.append(model.weight.detach().clone())
    # Compilation may order the same float32 operations otherwise.
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6)


def test_capturable_without_a_gpu_is_one_clear_error_of_torchs():
    model = _model()
    optimizer = hvd_qgenx.ExtraAdam(model.parameters(), capturable=True)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        optimizer.extrapolation()


# ---- parameters that come later, or are odd ----------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
def test_groups_added_to_any_layer_take_part(make):
    for layer in range(len(_layers(MAKES[make](_model().parameters())))):
        x, y, gradients = game()
        optimizer = MAKES[make]([x])
        group = {"params": [y]}
        if isinstance(_innermost(optimizer), hvd_qgenx.QGenX):
            group |= {"method": "dual_extrapolation", "step_scale": 1.0, "iterations": 0}
        _layers(optimizer)[layer].add_param_group(group)
        for half_step in _verbs(optimizer) * 2:
            gradients()
            half_step()
        assert y.item() != 1.0


@pytest.mark.parametrize("make", [make for make in MAKES if "Adam" in make or make == "QGenX" or "QGenX" in make])
def test_complex_parameters_are_moved_as_their_parts_would_be(make):
    torch.manual_seed(0)
    start = torch.randn(5, dtype=torch.complex64)
    p, q = start.clone().requires_grad_(), torch.view_as_real(start).clone().requires_grad_()
    one, other = MAKES[make]([p]), MAKES[make]([q])
    for first, second in zip(_verbs(one) * 3, _verbs(other) * 3, strict=True):
        for optimizer, value in ((one, torch.view_as_real(p)), (other, q)):
            optimizer.zero_grad()
            (value * torch.arange(10.0).view(5, 2)).square().sum().backward()
        first()
        second()
    # QGenX adds complex numbers where it adds pairs: the same float32 operations.
    assert torch.allclose(torch.view_as_real(p), q, rtol=1e-6)


# ---- inside stock Horovod ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
def test_stock_horovods_wrapper_is_refused_where_it_is_made(make):
    model = _model()
    optimizer = MAKES[make](model.parameters())
    message = (
        r"averages gradients in step\(\) alone and cannot take .*: use hvd_qgenx.DistributedOptimizer, with the same"
    )
    with pytest.raises(ValueError, match=message):
        hvd.DistributedOptimizer(optimizer, model.named_parameters())
