"""Gradients as an exchange takes them, and means as gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_real(tensor: Tensor) -> Tensor:
    """The same memory as real numbers: of a complex tensor its real and imaginary parts, in a new dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The type of what a parameter of this type exchanges; float32 for one that has no gradient."""
    if dtype.is_complex:
        return dtype.to_real()
    return dtype if dtype.is_floating_point else torch.float32


def is_expanded(tensor: Tensor) -> bool:
    """Whether several coordinates are one number in memory, so that they cannot be overwritten one by one."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def assign(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], means: Sequence[Tensor | None]) -> None:
    """Makes each mean its parameter's gradient, in the gradient's own memory if it has one.

    Args:
        parameters: whose ``grad`` is set.
        gradients: what was exchanged for each, a gradient itself or made of it.
        means: float vectors of any shape; None where no rank had a gradient, or a gradient itself, overwritten already.
    """
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for p, gradient, mean in zip(parameters, gradients, means, strict=True):
        if mean is None or mean is p.grad:
            continue
        if p.grad is None or p.grad.is_sparse or gradient is None or is_expanded(p.grad) or p.grad.is_conj():
            p.grad = _new_gradient(p, mean)
        else:
            targets.append(as_real(p.grad))
            values.append(mean.view(targets[-1].shape))
    if targets:
        torch._foreach_copy_(targets, values)


def _new_gradient(p: Tensor, mean: Tensor) -> Tensor:
    real = mean.to(device=p.device, dtype=real_type(p.dtype), copy=True)
    return torch.view_as_complex(real.view(*p.shape, 2)) if p.is_complex() else real.view(p.shape)
