"""The codec: levels x rounding x coder x payload, as one frozen value."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hvd_qgenx.backends import Drawn, backend_of, device_of, home
from hvd_qgenx.checks import check_choice, check_integer, check_integers, check_type
from hvd_qgenx.codebook import CODERS, Codebook, make_code
from hvd_qgenx.key import Key
from hvd_qgenx.layout import MAX_BUCKET_SIZE, Layout, layout_of
from hvd_qgenx.levels import NORMS, Levels
from hvd_qgenx.payload import Header, bound, check_payload, read_sizes

ROUNDINGS = ("stochastic",)
_COUNT_SCALE = 2**20
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Codec:
    """Encodes float vectors without bias and decodes means of them: E decode(encode(v)) = v.

    Args:
        levels: positive levels, ``Levels``.
        coder: "huffman", "elias_gamma", "elias_delta", "elias_omega", "elias_runs" or "fixed". "elias_runs" is QSGD's:
            Elias omega of the gaps between non-zeros and of their levels. "huffman" codes zeros as runs (Golomb-Rice)
            where the counts say that more than four in five are zeros, else by words of their own; of the non-zeros,
            ones likewise.
        bucket_size: coordinates that share a norm, 1 to 16384.
        norm: "l2" or "linf".
        rounding: "stochastic".
        counts: s + 1 integers, how often each magnitude occurs, from which Huffman lengths are made; None means those
            that ``levels.symbol_probabilities`` gives a normal bucket.
        min_numel: segments with fewer coordinates travel as float32.

    Raises:
        ValueError: naming the argument, when the codec is made.
    """

    levels: Levels
    coder: str = "huffman"
    bucket_size: int = 1024
    norm: str = "l2"
    rounding: str = "stochastic"
    counts: tuple[int, ...] | None = None
    min_numel: int = 0

    def __post_init__(self):
        check_type("levels", self.levels, Levels)
        check_choice("coder", self.coder, CODERS)
        check_integer("bucket_size", self.bucket_size, 1, MAX_BUCKET_SIZE)
        check_choice("norm", self.norm, NORMS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_integer("min_numel", self.min_numel, 0, 2**32 - 1)
        if self.counts is not None:
            # A frozen value may still bring its arguments into their final form.
            object.__setattr__(self, "counts", _check_counts(self.counts, self.levels.num_levels + 1))

    @cached_property
    def codebook(self) -> Codebook:
        """The levels and the code words of their symbols."""
        counts: Sequence[int] | None = self.counts
        if self.coder == "huffman" and counts is None:
            shares = self.levels.symbol_probabilities(self.norm, self.bucket_size)
            # Integers, since ranks that differ in a last bit would have other code words.
            counts = [round(share * _COUNT_SCALE) for share in shares]
        return Codebook(self.coder, self.levels, make_code(self.coder, self.levels.num_levels, counts))

    def layout(self, sizes: Sequence[int]) -> Layout:
        """How segments of these sizes are cut."""
        return layout_of(tuple(sizes), self.min_numel, self.bucket_size)

    def bound(self, numel: int, sizes: Sequence[int] | None = None) -> int:
        """Bytes of the largest payload for ``numel`` coordinates, cut into segments of ``sizes``."""
        sizes = _check_sizes(sizes, check_integer("numel", numel, 0))
        return bound(self.layout(sizes), self.codebook, inline=True)

    def expected_bits(self, numel: int, probabilities: Sequence[float] | None = None) -> float:
        """Expected bits of the norms, lengths and code words of ``numel`` coordinates in one segment.

        sum over buckets of 32 (norm) + 16 (length, not for the fixed coder), plus numel * sum_m p_m (mean bits of the
        words of m and -m), and runs; a bucket's last byte may add up to 7 bits. With Huffman lengths made from the same
        probabilities it stays below Theorem 2's C_q + (1 - p_0) d + (H(p) + 1) d, C_q = 48 bits a bucket. Source:
        Q-GenX, theorem 2.

        Args:
            numel: coordinates, 0 or more.
            probabilities: p_0, ..., p_s of the magnitudes; None means those of normal buckets.
        """
        check_integer("numel", numel, 0)
        if probabilities is None:
            probabilities = self.levels.symbol_probabilities(self.norm, self.bucket_size)
        if len(probabilities) != self.levels.num_levels + 1:
            raise ValueError(f"probabilities must be {self.levels.num_levels + 1} numbers, got {len(probabilities)}")
        code = self.codebook.code
        # A fixed width tells the bytes of a bucket, so no length travels.
        headers = (32.0 if code.width else 48.0) * -(-numel // self.bucket_size)
        return headers + numel * code.expected_bits(probabilities, self.bucket_size)

    def encode(
        self,
        gradient: Tensor,
        key: Key,
        out: Tensor | None = None,
        *,
        sizes: Sequence[int] | None = None,
        inline: bool = True,
        counts: Tensor | None = None,
    ) -> Tensor:
        """One payload, uint8[size], 1-D.

        Args:
            gradient: float tensor of any shape; converted to float32. A segment with a coordinate that is not finite
                (or with an L2 norm above the largest float32) decodes to NaN throughout.
            key: of the random draws; never use one twice.
            out: uint8[>= bound], overwritten from its start; the result is then a view of it.
            sizes: coordinates of the segments; buckets never span two. None is one segment.
            inline: whether levels and code lengths travel with the payload, or only their hash.
            counts: int64[s + 1], overwritten with how often each magnitude's index was drawn.
        """
        vector = as_vector(gradient)
        check_type("key", key, Key)
        layout = self.layout(_check_sizes(sizes, len(vector)))
        # With the inline codebook even if it stays behind: one bound, whatever is sent.
        most = bound(layout, self.codebook, inline=True)
        buffer = torch.empty(most, dtype=torch.uint8, device="cpu") if out is None else _check_out(out, most)
        drawn = self.encode_segments(vector.split(list(layout.sizes)), layout, key, buffer, inline)
        if counts is not None:
            counts.copy_(drawn.counts)
        payload = buffer[: drawn.size]
        # A view would keep the whole buffer, which is as large as the worst payload.
        return payload.clone() if out is None else payload

    def encode_segments(
        self, segments: Sequence[Tensor], layout: Layout, key: Key, out: Tensor, inline: bool = False
    ) -> Drawn:
        """Writes one payload of segments where they lie to the start of ``out``.

        Args:
            segments: contiguous float32 tensors of ``layout.sizes`` coordinates.
            layout: of this codec's, see ``layout``.
            out: uint8[>= bound].
        """
        backend = backend_of(home(device_of(segments, out.device)))
        return backend.encode(self.codebook, self.norm, layout, key, segments, out, inline)

    def decode_mean(self, payloads: Sequence[Tensor], numel: int | None = None, out: Tensor | None = None) -> Tensor:
        """float32[numel]: the sum of the payloads' vectors, in their order, divided by how many there are.

        Args:
            payloads: 1-D uint8 tensors, one or more.
            numel: coordinates that the caller expects; checked before anything is allocated. None takes the first
                payload's word for it.
            out: float32[numel], overwritten.

        Raises:
            PayloadError: if a payload is damaged, of another length, or refers to a codebook that is not this codec's.
        """
        if len(payloads) == 0:
            raise ValueError("payloads must hold at least one payload")
        payloads = [check_payload(payload) for payload in payloads]
        if out is None:
            numel = self.parse(payloads[0], numel).layout.numel
            out = torch.empty(numel, dtype=torch.float32, device="cpu")
        # The backend wants targets cut as payloads are; it checks what is believed here.
        cuts = [_sizes_of(payload, len(_check_vector(out, numel))) for payload in payloads]
        backend = backend_of(out.device)
        if None not in cuts and all(cut == cuts[0] for cut in cuts):
            backend.decode_mean(self.codebook, payloads, out.split(cuts[0]))
        else:
            self._add_up(payloads, out)
        return out

    def _add_up(self, payloads: Sequence[Tensor], out: Tensor) -> None:
        """The mean of payloads whose segments are not the same: each is decoded by itself."""
        sizes = [list(self.parse(payload, len(out)).layout.sizes) for payload in payloads]
        one, backend = torch.empty_like(out), backend_of(out.device)
        out.zero_()
        for payload, cut in zip(payloads, sizes, strict=True):
            backend.decode_mean(self.codebook, [payload], one.split(cut))
            out.add_(one)
        out.div_(len(payloads))

    def decode_sections(
        self,
        payloads: Sequence[Tensor],
        targets: Sequence[Tensor],
        sections: Sequence[Sequence[int]] | None = None,
        factor: float = 1.0,
    ) -> tuple[bool, ...]:
        """Means of sections straight into float32 vectors; see ``Backend.decode_mean``."""
        backend = backend_of(home(device_of(targets, torch.device("cpu"))))
        return backend.decode_mean(self.codebook, payloads, targets, sections, factor)

    def parse(self, payload: Tensor, numel: int | None = None) -> Header:
        """What a payload says of itself, compared with its bytes; raises PayloadError."""
        payload = check_payload(payload)
        return backend_of(payload.device).parse(payload, numel)

    def statistics(self, segments: Sequence[Tensor], layout: Layout, form: str) -> tuple[int, Tensor, Tensor]:
        """What ``adaptation.Statistics`` holds in this form, of the coded segments of a float32 vector."""
        device = device_of(segments, torch.device("cpu"))
        return backend_of(home(device)).statistics(self.norm, layout, segments, form)


def check_gradient(tensor: Tensor) -> Tensor:
    """``tensor``, if it is a dense floating-point tensor."""
    if isinstance(tensor, Tensor) and tensor.dtype in _FLOATS and tensor.layout == torch.strided:
        return tensor
    kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
    raise ValueError(f"gradient must be a dense float16, bfloat16, float32 or float64 tensor, got {kind}")


def as_segment(gradient: Tensor) -> Tensor:
    """A contiguous float32 tensor with the values of a floating-point one, where it can be coded; itself if it is."""
    if gradient.dtype is torch.float32 and can_be_coded(gradient):
        return gradient.detach() if gradient.requires_grad else gradient
    return as_vector(gradient)


def can_be_coded(tensor: Tensor) -> bool:
    """Whether a tensor lies where it can be coded, and in one piece."""
    return (tensor.is_cpu or home(tensor.device) == tensor.device) and tensor.is_contiguous()


def as_vector(gradient: Tensor) -> Tensor:
    """A contiguous float32 vector with the values of a floating-point tensor of any shape, where it can be coded."""
    gradient = check_gradient(gradient).detach()
    return gradient.to(device=home(gradient.device), dtype=torch.float32).reshape(-1).contiguous()


def _sizes_of(payload: Tensor, numel: int) -> list[int] | None:
    """How a payload cuts its vector, not checked but for the sum, as backends check it; None if it does not fit."""
    try:
        sizes = list(read_sizes(memoryview(payload.numpy().data)))
    except (ValueError, struct.error):  # it is shorter than it says
        return None
    return sizes if sum(sizes) == numel else None


def _check_counts(counts: Sequence[int], length: int) -> tuple[int, ...]:
    values = check_integers("counts", counts, 0)
    if len(values) != length:
        raise ValueError(f"counts must be {length} integers, one for each magnitude, got {len(values)}")
    return values


def _check_sizes(sizes: Sequence[int] | None, numel: int) -> tuple[int, ...]:
    sizes = (numel,) if sizes is None else check_integers("sizes", sizes, 0)
    if sum(sizes) != numel:
        raise ValueError(f"sizes must add up to the gradient's {numel} coordinates, got {sum(sizes)}")
    return sizes


def _check_out(out: Tensor, least: int) -> Tensor:
    fits = check_type("out", out, Tensor).dtype == torch.uint8 and out.dim() == 1 and out.is_contiguous()
    if not fits or len(out) < least:
        raise ValueError(f"out must be a contiguous 1-D uint8 tensor of at least bound(numel) bytes, {least} here")
    return out


def _check_vector(out: Tensor, numel: int | None) -> Tensor:
    fits = check_type("out", out, Tensor).dtype == torch.float32 and out.dim() == 1 and out.is_contiguous()
    if not fits or (numel is not None and len(out) != numel):
        wanted = "a contiguous float32 vector" if numel is None else f"float32 of shape ({numel},)"
        raise ValueError(f"out must be {wanted}, got {out.dtype} {tuple(out.shape)}")
    return out
