"""Means become gradients, in the gradients' own memory where that can be."""

import pytest
import torch

from hvd_qgenx.gradients import as_real, assign, real_type

FLAT = torch.zeros(30)
GRADIENTS = {
    "plain": lambda: torch.zeros(4, 3),
    "transposed": lambda: torch.zeros(3, 4).t(),
    "a view of a flat buffer": lambda: FLAT[5:17].view(4, 3),
    "every second number": lambda: torch.zeros(8, 3)[::2],
    "half precision": lambda: torch.zeros(4, 3, dtype=torch.float16),
    "double precision": lambda: torch.zeros(4, 3, dtype=torch.float64),
    "channels last": lambda: torch.zeros(1, 3, 2, 2).to(memory_format=torch.channels_last),
    "a single number": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0, 3),
    "complex": lambda: torch.zeros(4, 3, dtype=torch.complex64),
    "complex double": lambda: torch.zeros((), dtype=torch.complex128),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_mean_lands_where_the_gradient_lies(kind):
    gradient = GRADIENTS[kind]()
    p = torch.zeros(gradient.shape, dtype=gradient.dtype, requires_grad=True)
    p.grad = gradient
    mean = torch.arange(1.0, as_real(gradient).numel() + 1)
    assign([p], [as_real(gradient)], [mean])
    assert p.grad.data_ptr() == gradient.data_ptr() and p.grad.stride() == gradient.stride()
    assert torch.equal(as_real(p.grad).reshape(-1).float(), mean)


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (4, 1)])
def test_an_expanded_gradient_is_replaced(shape):
    gradient = torch.zeros(()).expand(shape)
    p = torch.zeros(shape, requires_grad=True)
    p.grad = gradient
    mean = torch.arange(1.0, gradient.numel() + 1)
    assign([p], [gradient], [mean])
    assert torch.equal(p.grad.reshape(-1), mean) and float(gradient.reshape(-1)[0]) == 0.0


def test_a_conjugated_gradient_is_replaced_by_the_mean():
    p = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.tensor([1 + 2j, 3j, 4.0]).conj()
    mean = as_real(p.grad).reshape(-1).clone()
    assert torch.equal(mean, torch.tensor([1.0, -2.0, 0.0, -3.0, 4.0, 0.0]).abs() * mean.sign())
    assign([p], [as_real(p.grad)], [2 * mean])
    assert torch.equal(p.grad.resolve_conj(), torch.tensor([2 - 4j, -6j, 8.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_a_parameter_without_gradient_gets_one_of_its_own_type(dtype):
    p = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    mean = torch.arange(12.0 if dtype.is_complex else 6.0)
    assign([p], [None], [mean])
    assert p.grad.dtype == dtype and torch.equal(as_real(p.grad).reshape(-1).float(), mean)
    mean.zero_()
    assert as_real(p.grad).float().sum() > 0, "it has memory of its own"


def test_types_that_are_exchanged_are_real():
    assert real_type(torch.complex64) == torch.float32 and real_type(torch.complex128) == torch.float64
    assert real_type(torch.int32) == torch.float32 and real_type(torch.float16) == torch.float16
