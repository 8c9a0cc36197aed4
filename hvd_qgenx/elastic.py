"""State that survives ranks which come and go, under ``horovodrun``'s elastic mode.

@hvd_qgenx.elastic.run
def train(state):
    while state.batch < batches:
        ...
        state.batch += 1
        state.commit()

train(hvd_qgenx.elastic.State(model=model, optimizer=optimizer, batch=0))
"""

from __future__ import annotations

import copy
from typing import Any

import horovod.torch as hvd
from horovod.common.elastic import ObjectState
from horovod.torch.elastic import ElasticSampler, run
from horovod.torch.elastic.state import StateHandler

__all__ = ["State", "run"]


class Handler(StateHandler):
    """Of anything with ``state_dict`` and ``load_state_dict``: what rank 0 holds is what all ranks hold."""

    def __init__(self, value: Any):
        super().__init__(value)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        self.value.load_state_dict(hvd.broadcast_object(self.value.state_dict(), root_rank=0))
        self.save()


class State(ObjectState):
    """What a rank must hold to go on, as keyword arguments; an attribute each.

    Horovod's ``TorchState`` for everything that there is here: models, a ``Game``, an averaged model, optimizers,
    this package's wrapper, ``Compression.qgenx(...)``, schedulers, samplers (all that have ``state_dict`` and
    ``load_state_dict``), and plain objects. ``commit`` keeps it in memory; after a fault ``run`` returns to the last
    commit, and ranks that join take it over from rank 0, which Horovod lets be one that was there before.

    Args:
        values: by name.

    Example:
        >>> state = State(model=model, optimizer=optimizer, compressor=compressor, sampler=sampler, epoch=0)
    """

    def __init__(self, **values: Any):
        self._handlers = {name: Handler(value) for name, value in values.items() if _has_state(value)}
        for name, handler in self._handlers.items():
            super().__setattr__(name, handler.value)
        plain = {name: value for name, value in values.items() if name not in self._handlers}
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **plain)

    def save(self) -> None:
        """Keeps everything as it is now."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Returns to what was kept last."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Takes over what rank 0 holds."""
        for handler in self._handlers.values():
            handler.sync()
        super().sync()

    def reset(self) -> None:
        """Called after ranks have changed: samplers divide what is left among those that are there."""
        for handler in self._handlers.values():
            if isinstance(handler.value, ElasticSampler):
                handler.value.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_handlers", ()):
            self._handlers[name].set_value(value)
        super().__setattr__(name, value)


def _has_state(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
