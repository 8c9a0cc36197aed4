"""Runs of 20 iterations whose last parameters are kept as hashes in tests/golden/runs.json.

A change that is to move no bit must end in the same hashes. Gradients are products and sums of float32 alone, and
torch's own kernels are held to one instruction set (ATEN_CPU_CAPABILITY=default), so that hashes are the same on every
processor. `horovodrun --gloo -np 3 python runs.py` writes them anew.
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import horovod.torch as hvd
import torch

import hvd_qgenx
from hvd_qgenx import Compression

#: This rank's number; replaced where torchrun has started the ranks.
rank_here = hvd.rank
FILE = Path(__file__).parents[1] / "golden" / "runs.json"
RANKS = 3
ITERATIONS = 20
RESUMED_AT = 10
SHAPES = ((40, 40), (3, 700), (1030,), (7,), (5, 3), (1,))

KINDS = {
    "none": Compression.none,
    "qgenx4": Compression.qgenx(bits=4, seed=3, adapt_at=(0, 3, 12)),
    "fp16": Compression.fp16,
    "qgenx3_normal": Compression.qgenx(bits=3, seed=4, statistics="normal", adapt_every=8, bucket_size=300),
    "rate_aware": Compression.qgenx(bits=4, rate_weight=0.02, adapt_at=(1,)),
    "fixed8": Compression.qgenx(bits=8, levels="uniform", coder="fixed", norm="linf"),
    "ternary": Compression.qgenx(bits=2, levels="uniform", min_numel=1),
    "omega": Compression.qgenx(bits=4, levels="exponential", coder="elias_omega"),
}


def _qgenx(method):
    return lambda parameters: hvd_qgenx.QGenX(parameters, method=method, step_scale=0.02)


METHODS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "extra_sgd": lambda parameters: hvd_qgenx.ExtraSGD(parameters, lr=0.05),
    "extra_adam": lambda parameters: hvd_qgenx.ExtraAdam(parameters, lr=0.01),
    "extra_adam_past": lambda parameters: hvd_qgenx.ExtraAdam(parameters, lr=0.01, past=True),
    "dual_extrapolation": _qgenx("dual_extrapolation"),
    "dual_averaging": _qgenx("dual_averaging"),
    "optimistic": _qgenx("optimistic"),
}

#: (entrance, method, kind, options of the optimizer)
CASES = [
    *(("wrapper", method, kind, {}) for method in METHODS for kind in ("none", "qgenx4")),
    *(("wrapper", method, kind, {}) for method in ("extra_adam", "dual_extrapolation") for kind in list(KINDS)[2:]),
    ("wrapper", "extra_sgd", "qgenx4", {"op": hvd.Sum}),
    ("wrapper", "extra_sgd", "none", {"op": hvd.Sum}),
    ("wrapper", "extra_sgd", "none", {"gradient_predivide_factor": 3.0}),
    *(("drop-in", method, kind, {}) for method in ("sgd", "adam") for kind in KINDS if kind not in ("none", "fp16")),
    ("drop-in", "sgd", "qgenx4", {"op": hvd.Sum}),
    ("drop-in", "sgd", "qgenx4", {"gradient_predivide_factor": 3.0}),
]


def name_of(case) -> str:
    entrance, method, kind, options = case
    return " ".join([entrance, method, kind, *(f"{key}={getattr(v, '__name__', v)}" for key, v in options.items())])


def _parameters():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(-512, 513, shape, generator=generator) / 256 for shape in SHAPES]
    return [torch.nn.Parameter(value) for value in values]


def _gradients(parameters, call: int, may_lack: bool):
    """Of half-step ``call`` on this rank: p / 2 and noise; now and then a rank lacks one."""
    generator = torch.Generator().manual_seed(1000 * call + rank_here())
    noise = [torch.randint(-1024, 1025, p.shape, generator=generator) / 256 for p in parameters]
    gradients = [p.detach() * 0.5 + n for p, n in zip(parameters, noise, strict=True)]
    if may_lack and call % 5 == rank_here():
        gradients[call % 2] = None
    return gradients


class _Run:
    """One case: an optimizer that is made anew, on new parameters, when it resumes."""

    def __init__(self, case):
        self.entrance, self.method, kind, self.options = case
        self.kind, self.calls = KINDS[kind], 0
        self._make(_parameters())

    def _make(self, parameters):
        self.parameters = parameters
        base, named = METHODS[self.method](parameters), [(f"p{i}", p) for i, p in enumerate(parameters)]
        self.compressor = copy_of(self.kind) if self.entrance == "drop-in" else self.kind
        make = hvd.DistributedOptimizer if self.entrance == "drop-in" else hvd_qgenx.DistributedOptimizer
        self.optimizer = make(base, named, compression=self.compressor, **self.options)

    def half_step(self, step):
        gradients = _gradients(self.parameters, self.calls, self.entrance == "wrapper")
        self.calls += 1
        self.optimizer.zero_grad()
        if self.entrance == "drop-in":  # Horovod's hooks need a backward, and this one's gradients are exact
            pairs = zip(self.parameters, gradients, strict=True)
            torch.stack([(p * gradient).sum() for p, gradient in pairs]).sum().backward()
        else:
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient
        step()

    def resume(self):
        state = copy.deepcopy(self.optimizer.state_dict())
        codec = copy.deepcopy(self.compressor.state_dict()) if self.entrance == "drop-in" else None
        self._make([torch.nn.Parameter(p.detach().clone()) for p in self.parameters])
        self.optimizer.load_state_dict(state)
        if codec:
            self.compressor.load_state_dict(codec)

    def iterate(self, iteration):
        if self.entrance == "wrapper" and hasattr(self.optimizer.optimizer, "extrapolation"):
            self.half_step(lambda: self.optimizer.extrapolation())
        if iteration == RESUMED_AT:
            self.resume()
        self.half_step(lambda: self.optimizer.step())

    def hash(self) -> str:
        digest = hashlib.sha256()
        for p in self.parameters:
            digest.update(p.detach().numpy().tobytes())
        return digest.hexdigest()[:32]


def copy_of(compressor):
    """A compressor of the same settings and of its own state."""
    settings = compressor.settings
    return compressor(**{name: getattr(settings, name) for name in settings.__dataclass_fields__})


def run(case) -> str:
    """The hash of the parameters after the last iteration."""
    one = _Run(case)
    for iteration in range(ITERATIONS):
        one.iterate(iteration)
    return one.hash()


def main():
    hvd.init()
    torch.set_num_threads(1)
    if hvd.size() != RANKS or os.environ.get("ATEN_CPU_CAPABILITY") != "default":
        raise SystemExit(f"run under horovodrun -np {RANKS} with ATEN_CPU_CAPABILITY=default")
    found = {name_of(case): run(case) for case in CASES}
    if hvd.rank() == 0:
        FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
