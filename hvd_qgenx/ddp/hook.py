"""The hook itself, as PyTorch calls it."""

# No `from __future__ import annotations`: DDP compares the hook's annotations with types.
import torch.distributed as dist

from hvd_qgenx.checks import check_type
from hvd_qgenx.ddp.state import QGenXState, TensorFuture


def qgenx_hook(state: QGenXState, bucket: dist.GradBucket) -> TensorFuture:  # type: ignore[name-defined]
    """The mean over ranks of a bucket's gradients, coded on the wire; for ``register_comm_hook``.

    Returns:
        A future of the bucket's own buffer, overwritten by the mean. It never waits for the network.

    Raises:
        TypeError: if it is not DistributedDataParallel that calls.

    Example:
        >>> ddp_model.register_comm_hook(QGenXState(bits=4), qgenx_hook)
    """
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(
            "qgenx_hook is for DistributedDataParallel, which hands over a GradBucket; FullyShardedDataParallel and "
            f"others are not supported: it got a {type(bucket).__name__}"
        )
    check_type("state", state, QGenXState)
    return state.take(bucket)
