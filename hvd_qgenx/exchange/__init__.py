"""The mean of a list of tensors over ranks; knows no framework. ``exchange.Exchange`` declares the verbs."""

from hvd_qgenx.exchange.automatic import AutomaticExchange
from hvd_qgenx.exchange.coded import PLANS, CodedExchange
from hvd_qgenx.exchange.dense import DenseExchange
from hvd_qgenx.exchange.exchange import Alone, Collected, Exchange
from hvd_qgenx.exchange.message import DisagreementError

__all__ = [
    "PLANS",
    "Alone",
    "AutomaticExchange",
    "CodedExchange",
    "Collected",
    "DenseExchange",
    "DisagreementError",
    "Exchange",
]
