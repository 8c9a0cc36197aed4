"""What the specification draws, without coding it."""

from hvd_qgenx.backends.specification import Quantized, quantize, received


def drawn(codec, vector, key, sizes=None) -> Quantized:
    """Symbols, norms and raw coordinates of a vector in segments of ``sizes``, or in one."""
    return quantize(codec.codebook, codec.norm, codec.layout(sizes or (len(vector),)), key, vector)


def as_received(codec, vector, key, sizes=None):
    """float32[n]: what a receiver of these draws decodes."""
    return received(codec.layout(sizes or (len(vector),)), drawn(codec, vector, key, sizes), codec.levels)
