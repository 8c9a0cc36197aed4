"""Both entrances under the habits of torch's users: defaults, odd gradients, sparse ones, copies, late ranks."""

import copy
import pickle
import sys
import warnings

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression

RANKS = hvd.size()
FINE = {"bits": 8, "levels": "uniform", "norm": "linf"}  # every coordinate within 1/127 of the rank's largest


def _stock(named, base=None, compression=None, **options):
    base = base or torch.optim.SGD([p for _, p in named], lr=0.1)
    return hvd.DistributedOptimizer(base, named, compression=compression or Compression.qgenx(**FINE), **options)


def _ours(named, base=None, compression=None, **options):
    base = base or torch.optim.SGD([p for _, p in named], lr=0.1)
    return hvd_qgenx.DistributedOptimizer(base, named, compression=compression or Compression.qgenx(**FINE), **options)


def _ours_none(named, base=None, **options):
    return _ours(named, base, Compression.none, **options)


ENTRANCES = {"stock": _stock, "ours": _ours, "ours with none": _ours_none}
OURS = {"ours": _ours, "ours with none": _ours_none}


def _near(gradient, factor=(RANKS + 1) / 2):
    """Whether every coordinate is the mean of 1, 2, ..., K, as far as 8 bits tell."""
    return bool(((gradient - factor).abs() <= RANKS / 127).all())


# ---- the user's global defaults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_exchanges_under_another_default_type(entrance, dtype):
    torch.set_default_dtype(dtype)
    try:
        _check_one_step(entrance)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_exchanges_under_another_default_device(entrance):
    with torch.device("meta"):
        _check_one_step(entrance)


def _check_one_step(entrance):
    values = [torch.zeros(numel, dtype=torch.float32, device="cpu") for numel in (3000, 3)]
    named = [(f"p{i}", torch.nn.Parameter(value)) for i, value in enumerate(values)]
    optimizer = ENTRANCES[entrance](named)
    for _ in range(2):
        optimizer.zero_grad()
        sum((p * (hvd.rank() + 1)).sum() for _, p in named).backward()
        optimizer.step()
    assert all(_near(p.grad) and p.grad.device.type == "cpu" for _, p in named)


@pytest.mark.parametrize("method", ["dual_extrapolation", "optimistic", "extra"])
def test_extra_gradient_and_adaptive_levels_under_other_defaults(method):
    model = network()
    rule = hvd_qgenx.ExtraAdam(model.parameters()) if method == "extra" else hvd_qgenx.QGenX(model.parameters(), method)
    optimizer = _ours(list(model.named_parameters()), rule, Compression.qgenx(bits=4))
    torch.set_default_dtype(torch.float64)
    try:
        for half_step in [optimizer.extrapolation, optimizer.step] * 2:
            optimizer.zero_grad()
            model(torch.randn(8, 40, dtype=torch.float32)).square().mean().backward()
            half_step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_on_all_ranks(model.parameters())


# ---- odd parameters and gradients --------------------------------------------------------------------------------

LAYOUTS = {
    "plain": lambda n: torch.zeros(n, 4),
    "transposed": lambda n: torch.zeros(4, n).t(),
    "every second row": lambda n: torch.zeros(2 * n, 4)[::2],
    "expanded": lambda n: torch.zeros(()).expand(n, 4),
    "channels last": lambda n: torch.zeros(1, n, 2, 2).to(memory_format=torch.channels_last),
    "a single number": lambda n: torch.zeros(()),
    "empty": lambda n: torch.zeros(0, n),
    "half precision": lambda n: torch.zeros(n, 4, dtype=torch.float16),
    "double precision": lambda n: torch.zeros(n, 4, dtype=torch.float64),
    "complex": lambda n: torch.zeros(n, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("numel", [3, 700])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_gradients_of_any_layout_get_the_mean(entrance, layout, numel):
    start = LAYOUTS[layout](numel)
    p = torch.nn.Parameter(torch.zeros(start.shape, dtype=start.dtype))
    optimizer = ENTRANCES[entrance]([("p", p)])
    for _ in range(2):
        optimizer.zero_grad()
        value = hvd.rank() + 1.0
        # As a backward would leave it; stock Horovod takes it in the next step, since no hook of its has run.
        p.grad = torch.tensor(value).expand(start.shape) if layout == "expanded" else torch.full_like(start, value)
        optimizer.step()
        assert p.grad.shape == p.shape and p.grad.dtype == p.dtype and _near(p.grad)
    assert same_on_all_ranks([torch.view_as_real(p) if p.is_complex() else p])


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")  # torch's, of strides
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_gradients_that_are_views_of_a_flat_buffer_are_updated_in_place(entrance, step, dtype):
    parameters = [torch.nn.Parameter(torch.zeros(1500, dtype=dtype)) for _ in range(2)]
    flat = torch.zeros(3000 * step, dtype=dtype)
    for p, part in zip(parameters, flat.split(1500 * step), strict=True):
        p.grad = part[::step]
    optimizer = ENTRANCES[entrance]([(f"p{i}", p) for i, p in enumerate(parameters)])
    for _ in range(2):
        flat.zero_()
        sum((p * (hvd.rank() + 1)).sum() for p in parameters).backward()
        optimizer.step()
        assert _near(flat[::step]), "the buffer has the mean"
    assert [p.grad.data_ptr() for p in parameters] == [part.data_ptr() for part in flat.split(1500 * step)]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_complex_gradients_under_a_real_backward(entrance):
    p = torch.nn.Parameter(torch.zeros(1200, dtype=torch.complex64))
    optimizer = ENTRANCES[entrance]([("p", p)])
    (torch.view_as_real(p) * torch.tensor([1.0, -2.0]) * (hvd.rank() + 1)).sum().backward()
    optimizer.step()
    mean = torch.view_as_real(p.grad)
    assert (mean - torch.tensor([1.0, -2.0]) * (RANKS + 1) / 2).abs().max() <= 2 * RANKS / 127


@pytest.mark.parametrize("entrance", OURS)
def test_parameters_that_change_later_are_agreed_anew(entrance):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = OURS[entrance](list(model.named_parameters()), base)

    def step():
        optimizer.zero_grad()
        (sum(p.sum() for group in base.param_groups for p in group["params"]) * (hvd.rank() + 1)).backward()
        optimizer.step()
        return all(_near(p.grad) for group in base.param_groups for p in group["params"])

    assert step()
    base.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1100))]})
    assert step()
    model.double()
    assert step() and model[0].weight.grad.dtype == torch.float64
    base.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(50, 50))
    assert step()


def test_a_group_that_one_rank_alone_has_added_is_named():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = _ours(list(model.named_parameters()), base)
    for added in (False, True):
        optimizer.zero_grad()
        loss(model).backward()
        if added and hvd.rank() == 0:
            base.add_param_group({"params": [torch.nn.Parameter(torch.zeros(9))]})
        if added:
            message = message_on_all_ranks(RuntimeError, optimizer.step)
            assert "rank 0 is at exchange 0 (agreement), rank 1 at exchange 1 (step)" in message
        else:
            optimizer.step()


# ---- sparse gradients --------------------------------------------------------------------------------------------


def _table(optimizer, entrance, **options):
    torch.manual_seed(0)
    table = torch.nn.Embedding(200, 16, sparse=True)
    named = [("table", table.weight)]
    return table, ENTRANCES[entrance](named, optimizer(table.parameters()), **options)


SPARSE = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.1),
    "ExtraGradient": lambda parameters: hvd_qgenx.ExtraGradient(torch.optim.SparseAdam(list(parameters), lr=0.1)),
}


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("optimizer", SPARSE)
@pytest.mark.parametrize("entrance", OURS)
def test_rows_that_some_ranks_use_move_on_all(entrance, optimizer, as_dense):
    table, opt = _table(SPARSE[optimizer], entrance, sparse_as_dense=as_dense)
    before = table.weight.detach().clone()
    for _ in range(2):
        for half_step in (opt.extrapolation, opt.step) if optimizer.startswith("Extra") else (opt.step,):
            opt.zero_grad()
            table(torch.tensor([hvd.rank(), 7])).square().sum().backward()
            half_step()
    moved = (table.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [*range(RANKS), 7] and same_on_all_ranks([table.weight])
    assert opt.communication.bytes_sent > 2 * 2 * 16 * 4


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_the_mean_of_rows_is_exact_and_a_rank_without_any_gets_it(op):
    table, opt = _table(SPARSE["SGD"], "ours", op=op)
    for step in range(2):
        opt.zero_grad()
        if step == 0 or hvd.rank() == 0:
            (table(torch.tensor([3, 3, 4 + hvd.rank()])) * (hvd.rank() + 1.0)).sum().backward()
        opt.step()
        ranks = range(RANKS) if step == 0 else [0]
        expected = torch.zeros(200, 16)
        for rank in ranks:
            expected[3] += 2 * (rank + 1.0)
            expected[4 + rank] += rank + 1.0
        assert table.weight.grad.is_sparse
        assert torch.equal(table.weight.grad.to_dense(), expected / RANKS if op == hvd.Average else expected)


def test_rows_that_are_not_finite_spoil_the_mean_everywhere_with_a_warning():
    table, opt = _table(SPARSE["SGD"], "ours")
    table(torch.tensor([1])).sum().backward()
    if hvd.rank() == 0:
        table.weight.grad = table.weight.grad.coalesce() * float("nan")
    with pytest.warns(RuntimeWarning, match="the gradient of table is not finite on some rank"):
        opt.step()
    assert table.weight.grad.coalesce().values().isnan().all()


def test_a_sparse_gradient_is_refused_where_each_ranks_own_is_needed():
    table, opt = _table(lambda p: hvd_qgenx.QGenX(p), "ours")
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of table is sparse, which is not for QGenX: pass sparse_as"):
        opt.extrapolation()


# ---- process sets, identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("own", ["the last rank", "the last two ranks"])
def test_ranks_make_the_optimizers_of_their_own_process_sets_only(entrance, own):
    last = RANKS - 1
    ranks = [last] if own == "the last rank" else [last - 1, last]
    # Horovod makes no set twice, nor one of all ranks.
    group = hvd.add_process_set(ranks) if len(ranks) < RANKS else hvd.global_process_set
    means = []
    for members in (group, hvd.global_process_set):
        if members.included():
            p = torch.nn.Parameter(torch.zeros(2000))
            options = {"process_set": members}
            if entrance == "stock":
                options["compression"] = Compression.qgenx(**FINE, process_set=members)
            optimizer = ENTRANCES[entrance]([("p", p)], **options)
            (p * (hvd.rank() + 1.0)).sum().backward()
            optimizer.step()
            expected = sum(rank + 1.0 for rank in members.ranks) / len(members.ranks)
            means.append(bool(((p.grad - expected).abs() <= RANKS / 127).all()))
    assert all(means)
    hvd.barrier()
    if group is not hvd.global_process_set:
        hvd.remove_process_set(group)


@pytest.mark.skipif(RANKS < 3, reason="in a set of all ranks, places are global numbers")
def test_messages_name_the_ranks_of_the_whole_job():
    pair = hvd.add_process_set([1, 2])
    if pair.included():
        named = [("p", torch.nn.Parameter(torch.zeros(2000 + hvd.rank())))]
        optimizer = _ours(named, process_set=pair)
        named[0][1].sum().backward()
        with pytest.raises(RuntimeError, match=r"rank 1 has p of shape \(2001,\) .*, rank 2 has p of shape \(2002,\)"):
            optimizer.step()
    hvd.barrier()
    hvd.remove_process_set(pair)


@pytest.mark.parametrize("named", [False, True])
def test_optimizers_of_other_numbers_meet_by_name(named):
    """Rank 0 has made and kept another optimizer of the same names and shapes: a name says which belong together."""
    extra = [_ours([("p", torch.nn.Parameter(torch.zeros(2000)))])] if hvd.rank() == 0 else []
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = _ours([("p", p)], name="the one" if named else None)
    p.sum().backward()
    if named:
        optimizer.step()
    else:
        message = message_on_all_ranks(RuntimeError, optimizer.step)
        assert "number 2 of those with its names and shapes" in message
    del extra


# ---- what is refused says what was called ------------------------------------------------------------------------


def test_reducescatter_is_refused_by_its_name():
    with pytest.raises(ValueError, match="hvd.reducescatter cannot take Compression.qgenx"):
        hvd.reducescatter(torch.ones(2 * RANKS), compression=Compression.qgenx(**FINE))
    with pytest.raises(ValueError, match="hvd.grouped_reducescatter cannot take Compression.qgenx"):
        hvd.grouped_reducescatter([torch.ones(2 * RANKS)], compression=Compression.qgenx(**FINE))


@pytest.mark.parametrize("op", ["Min", "Max", "Product", "Adasum"])
@pytest.mark.parametrize("verb", ["allreduce", "grouped_allreduce"])
def test_operations_are_refused_by_their_names(verb, op):
    value = torch.ones(3000) if verb == "allreduce" else [torch.ones(3000)]
    with pytest.raises(ValueError, match=f"op must be hvd.Average or hvd.Sum .*, hvd.{verb} was given hvd.{op}"):
        getattr(hvd, verb)(value, op=getattr(hvd, op), compression=Compression.qgenx(**FINE))


def test_adasum_in_stock_horovods_optimizer_is_refused_by_its_name():
    p = torch.nn.Parameter(torch.ones(3000))
    optimizer = _stock([("p", p)], op=hvd.Adasum)
    with pytest.raises(ValueError, match="hvd.DistributedOptimizer was given hvd.Adasum"):
        p.sum().backward()
    del optimizer


def test_a_process_set_that_does_not_match_is_refused_by_its_ranks():
    alone = hvd.add_process_set([hvd.size() - 1])
    with pytest.raises(ValueError, match=rf"hvd.allreduce was given the process set of ranks \[{RANKS - 1}\], and its"):
        hvd.allreduce(torch.ones(3000), compression=Compression.qgenx(**FINE), process_set=alone)
    hvd.remove_process_set(alone)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_grouped_allreduce_works(op):
    values = [torch.full((3000,), hvd.rank() + 1.0), torch.full((5,), 2.0 * hvd.rank() + 2)]
    means = hvd.grouped_allreduce(values, name="grouped", op=op, compression=Compression.qgenx(**FINE))
    factor = RANKS if op == hvd.Sum else 1
    for value, mean in zip((1.0, 2.0), means, strict=True):
        assert (mean - factor * value * (RANKS + 1) / 2).abs().max() <= 2 * factor * RANKS / 127
    assert torch.equal(values[0], torch.full((3000,), hvd.rank() + 1.0)), "what was given stays as it was"


# ---- copies and late ranks ---------------------------------------------------------------------------------------

METHODS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "ExtraAdam": hvd_qgenx.ExtraAdam,
    "past": lambda p: hvd_qgenx.ExtraSGD(p, lr=0.1, past=True),
    **{m: (lambda p, m=m: hvd_qgenx.QGenX(p, m)) for m in ("dual_averaging", "dual_extrapolation", "optimistic")},
}
KINDS = {
    "none": Compression.none,
    "fp16": Compression.fp16,
    **{coder: Compression.qgenx(bits=4, coder=coder) for coder in ("huffman", "elias_omega", "fixed")},
    "normal": Compression.qgenx(bits=3, statistics="normal"),
}


def _half_step(model, optimizer):
    optimizer.zero_grad()
    loss(model).backward()
    is_due = not hasattr(optimizer.optimizer, "extrapolation") or optimizer.extrapolated
    optimizer.step() if is_due else optimizer.extrapolation()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("kind", ["none", "huffman"])
@pytest.mark.parametrize("method", ["SGD", "ExtraAdam", "optimistic"])
def test_a_copy_of_a_wrapper_connects_anew_and_goes_on_alike(method, kind, copier):
    model = network()
    optimizer = _ours(list(model.named_parameters()), METHODS[method](model.parameters()), KINDS[kind])
    for _ in range(3):
        _half_step(model, optimizer)
    other, its_optimizer = copier((model, optimizer))
    for pair in ((model, optimizer), (other, its_optimizer)):
        torch.manual_seed(5 + hvd.rank())
        for _ in range(4):
            _half_step(*pair)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert same_on_all_ranks(other.parameters())


def test_a_copy_of_a_compressor_goes_on_with_its_levels_under_stock_horovod():
    compressor = Compression.qgenx(bits=3, adapt_at=(0,), adapt_every=0)
    vectors = [torch.randn(5000) for _ in range(3)]
    for vector in vectors:
        hvd.allreduce(vector, name="original", compression=compressor)
    other = copy.deepcopy(compressor)
    means = [hvd.allreduce(vectors[0], name="both", compression=one) for one in (compressor, other)]
    assert torch.equal(*means) and other.state_dict()["version"] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("halfway", [False, True])
def test_a_rank_that_starts_afresh_takes_over_any_state(method, kind, halfway):
    """Rank 0 alone loads the wrapper's checkpoint; the others have the optimizer's own state, and no counters."""
    if halfway and method == "SGD":
        pytest.skip("a plain optimizer has one half-step")
    model = network()
    optimizer = _ours(list(model.named_parameters()), METHODS[method](model.parameters()), KINDS[kind])
    for _ in range(5 if halfway else 4):
        _half_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    if hvd.rank():
        del saved["param_groups"][0]["hvd_qgenx"]
    other = _ours(list(model.named_parameters()), METHODS[method](model.parameters()), KINDS[kind])
    other.load_state_dict(saved)
    for _ in range(3):
        _half_step(model, other)
    memories = gathered(other.state_dict()["param_groups"][0]["hvd_qgenx"]["step"])
    assert set(memories) == {memories[0]} and memories[0] > 2 and same_on_all_ranks(model.parameters())


# ---- Horovod's own tests that differ -----------------------------------------------------------------------------


def test_a_stateless_optimizer_has_no_state_after_a_broadcast_but_its_options():
    model = network()
    optimizer = _ours(list(model.named_parameters()), torch.optim.SGD(model.parameters(), lr=0.1 * (hvd.rank() + 1)))
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert len(optimizer.state) == 0 and optimizer.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.state) == 0
    loss(model).backward()
    optimizer.step()
    assert len(optimizer.state) == 0 and same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("make", [torch.optim.Adam, hvd_qgenx.ExtraAdam, hvd_qgenx.QGenX])
def test_a_broadcast_leaves_gradients_as_horovod_has_made_them(make):
    frozen = torch.nn.Parameter(torch.tensor([1, 3], dtype=torch.int32), requires_grad=False)
    p = torch.nn.Parameter(torch.rand(4))
    optimizer = _ours([("frozen", frozen), ("p", p)], make([frozen, p]))
    hvd.broadcast_parameters({"p": p}, root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert frozen.grad is None and torch.equal(p.grad, hvd.broadcast(p.grad, root_rank=0, name="gradient"))
    assert torch.equal(p.grad, torch.zeros(4))


@pytest.mark.parametrize("verb", ["step", "extrapolation"])
def test_the_warning_after_synchronize_is_horovods(verb):
    model = network()
    rule = hvd_qgenx.ExtraAdam(model.parameters()) if verb == "extrapolation" else None
    optimizer = _ours_none(list(model.named_parameters()), rule)
    loss(model).backward()
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(optimizer, verb)()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert f"optimizer.{verb}() called without optimizer.skip_synchronize()" in str(caught[0].message)


# ---- work for each parameter -------------------------------------------------------------------------------------


def _calls_in(action):
    """Functions that Python calls, its own and C's, during ``action``, in this thread."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("entrance", ["ours", "ours with none", "stock with names"])
def test_work_grows_as_the_number_of_parameters(entrance):
    """Counted, not timed: calls for each parameter, between 500 and 4,000 of them."""
    counts = {}
    for number in (500, 4000):
        named = [(f"p{i}", torch.nn.Parameter(torch.zeros(5))) for i in range(number)]
        if entrance == "stock with names":
            counts[number] = _calls_of_the_drop_in(named)
        else:
            optimizer = ENTRANCES[entrance](named)
            for _ in range(3):
                for _, p in named:
                    p.grad = torch.ones(5)
                counts[number] = _calls_in(optimizer.step) - _calls_in(optimizer.optimizer.step)
    each = (counts[4000] - counts[500]) / 3500
    fixed = counts[500] - 500 * each
    # 18 to 54 measured; a search through all parameters would add thousands. Looking for other ranks counts too.
    assert each < 80 and abs(fixed) < 3000, (each, fixed)


def _calls_of_the_drop_in(named):
    compressor = Compression.qgenx(**FINE, named_parameters=named)
    for _ in range(2):
        tensors, kept = [torch.ones(5) for _ in named], []
        count = _calls_in(lambda: kept.extend([compressor.compress(one) for one in tensors]))  # noqa: B023
        hvd.grouped_allreduce_([token for token, _ in kept], name=f"tokens.{len(named)}")
        count += _calls_in(lambda: [compressor.decompress(*one) for one in kept])  # noqa: B023
    return count
