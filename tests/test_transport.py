"""An operation that a signal's handler interrupts as it begins is known."""

import ctypes
import signal

import pytest

from hvd_qgenx.transports.horovod import keep

#: A function of C during which a signal comes, and which returns 0.
RAISE = getattr(ctypes.CDLL(None), "raise")


class Alarm(Exception):
    pass


@pytest.fixture
def handler():
    def ring(*_):
        raise Alarm

    before = signal.signal(signal.SIGUSR1, ring)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_what_a_function_returned_is_kept_though_a_signal_came_meanwhile(handler):
    numbers = []
    with pytest.raises(Alarm):
        keep(numbers, RAISE, (signal.SIGUSR1,))
    assert numbers == [0]


def test_a_call_of_pythons_own_would_lose_it(handler):
    numbers = []
    with pytest.raises(Alarm):
        numbers.append(RAISE(signal.SIGUSR1))
    assert numbers == []


def test_what_a_function_raised_is_raised_and_nothing_kept():
    numbers = []
    with pytest.raises(TypeError):
        keep(numbers, int, ("1", 10, None))
    assert numbers == []
