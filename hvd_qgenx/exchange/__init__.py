"""The mean of a list of tensors over ranks; knows no framework. ``exchange.Exchange`` declares the verbs."""

from hvd_qgenx.exchange.agreement import fingerprint
from hvd_qgenx.exchange.ahead import AheadExchange
from hvd_qgenx.exchange.automatic import AutomaticExchange
from hvd_qgenx.exchange.coded import PLANS, CodedExchange
from hvd_qgenx.exchange.dense import DenseExchange
from hvd_qgenx.exchange.exchange import Alone, Collected, Exchange, Term
from hvd_qgenx.exchange.hierarchical import HierarchicalExchange
from hvd_qgenx.exchange.message import DisagreementError, WithdrawnError
from hvd_qgenx.exchange.streamed import StreamedExchange

__all__ = [
    "PLANS",
    "AheadExchange",
    "Alone",
    "AutomaticExchange",
    "CodedExchange",
    "Collected",
    "DenseExchange",
    "DisagreementError",
    "Exchange",
    "HierarchicalExchange",
    "StreamedExchange",
    "Term",
    "WithdrawnError",
    "fingerprint",
]
