"""A communication hook for DistributedDataParallel.

    state = hvd_qgenx.ddp.QGenXState(bits=4)
    ddp_model.register_comm_hook(state, hvd_qgenx.ddp.qgenx_hook)

DDP hands over its buckets as backward fills them, and cuts them anew after the first iteration. What is sent does not
depend on that: parameters, in the model's order, are cut into parts of a size of their own, and a part is encoded and
sent as soon as the buckets with its parameters are there. Another thread waits for parts, decodes them into the
buckets, and completes the futures that DDP waits for. In the first backward, and where levels are fitted, all of it
happens there, after the last bucket.
"""

from hvd_qgenx.ddp.hook import qgenx_hook
from hvd_qgenx.ddp.state import QGenXState

__all__ = ["QGenXState", "qgenx_hook"]
