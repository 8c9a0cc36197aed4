"""Code words, codebooks, runs, and words laid out depth by depth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qgenx.backends.specification.rounding import Buckets
from hvd_qgenx.backends.specification.symbols import read_symbols, write_symbols
from hvd_qgenx.codebook import CODERS, huffman, make_code
from hvd_qgenx.layout import Layout
from hvd_qgenx.words import (
    FEW,
    FEW_WORD,
    MAX_WORD,
    CodeError,
    canonical_words,
    elias_delta,
    elias_gamma,
    elias_omega,
    huffman_lengths,
    rice_parameter,
)


def test_elias_code_words_are_those_of_elias_1975():
    gamma = {1: "1", 2: "010", 3: "011", 4: "00100", 5: "00101", 8: "0001000", 17: "000010001"}
    delta = {1: "1", 2: "0100", 3: "0101", 4: "01100", 8: "00100000", 17: "001010001"}
    omega = {
        1: "0",
        2: "100",
        3: "110",
        4: "101000",
        7: "101110",
        8: "1110000",
        16: "10100100000",
        100: "1011011001000",
    }
    assert {n: elias_gamma(n) for n in gamma} == gamma
    assert {n: elias_delta(n) for n in delta} == delta
    assert {n: elias_omega(n) for n in omega} == omega


def test_elias_lengths_are_those_of_the_table():
    lengths = {
        1: (1, 1, 1),
        2: (3, 4, 3),
        4: (5, 5, 6),
        8: (7, 8, 7),
        16: (9, 9, 11),
        32: (11, 10, 12),
        100: (13, 11, 13),
        1000: (19, 16, 17),
        10**6: (39, 28, 31),
    }
    for n, expected in lengths.items():
        assert (len(elias_gamma(n)), len(elias_delta(n)), len(elias_omega(n))) == expected


def test_huffman_lengths_and_canonical_words_are_exact():
    assert huffman_lengths([8, 4, 2, 1, 1]) == (1, 2, 3, 4, 4)
    assert canonical_words((1, 2, 3, 4, 4)) == ("0", "10", "110", "1110", "1111")
    assert canonical_words((2, 1, 2)) == ("10", "0", "11")


def test_huffman_ties_go_by_index():
    assert huffman_lengths([1, 1, 1]) == (2, 2, 1)
    assert huffman_lengths([5, 5]) == (1, 1)
    assert huffman_lengths([1, 1, 1, 1, 1, 1]) == (3, 3, 3, 3, 2, 2)


def test_one_symbol_has_the_empty_word():
    assert huffman_lengths([7]) == (0,)
    assert canonical_words((0,)) == ("",)


def test_symbols_never_seen_have_a_word():
    assert all(length > 0 for length in huffman_lengths([1000, 0, 0, 0]))


@pytest.mark.parametrize(("size", "limit"), [(60, MAX_WORD), (FEW + 1, MAX_WORD), (FEW, FEW_WORD), (10, FEW_WORD)])
def test_huffman_words_are_never_longer_than_the_limit(size, limit):
    fibonacci = [1, 1]
    while len(fibonacci) < size:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert max(huffman_lengths(fibonacci)) == limit


def _shortest(counts, limit):
    """The fewest bits of any code with words of at most ``limit`` bits, by trying all lengths that fill Kraft's sum."""

    def rest(counts, room, least):  # rarer symbols never have shorter words
        if not counts:
            return 0 if room == 0 else math.inf
        tried = (length for length in range(least, limit + 1) if 2 ** (limit - length) <= room)
        bits = (counts[0] * length + rest(counts[1:], room - 2 ** (limit - length), length) for length in tried)
        return min(bits, default=math.inf)

    return rest(sorted(counts, reverse=True), 2**limit, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 2**12), min_size=2, max_size=9))
def test_huffman_is_the_best_code_within_the_limit(counts):
    bits = sum(count * length for count, length in zip(counts, huffman_lengths(counts), strict=True))
    assert bits == _shortest(counts, FEW_WORD)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=128))
def test_huffman_is_complete_and_within_one_bit_of_the_entropy(counts):
    lengths = huffman_lengths(counts)
    assert sum(2.0**-length for length in lengths) == 1.0
    counts = [max(count, 1) for count in counts]
    total = sum(counts)
    mean = sum(count * length for count, length in zip(counts, lengths, strict=True)) / total
    entropy = -sum(count / total * math.log2(count / total) for count in counts)
    assert entropy - 1e-9 <= mean
    if max(lengths) < (FEW_WORD if len(counts) <= FEW else MAX_WORD):  # no word had to be shortened
        assert mean < entropy + 1


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 1, 60), (0, 255)])
def test_lengths_that_break_kraft_are_refused(lengths):
    with pytest.raises(CodeError, match="Kraft"):
        canonical_words(lengths)


@pytest.mark.parametrize("coder", [coder for coder in CODERS if coder != "fixed"])
@pytest.mark.parametrize("num_levels", [1, 3, 7, 127])
def test_no_code_word_is_the_beginning_of_another(coder, num_levels):
    words = [word for word in make_code(coder, num_levels, [1] * (num_levels + 1)).words if word]
    assert len(words) == 2 * num_levels + (coder != "elias_runs")
    assert not any(b.startswith(a) for i, a in enumerate(words) for j, b in enumerate(words) if i != j)


def test_words_end_with_the_sign():
    assert make_code("elias_gamma", 2).words == ("0111", "0101", "1", "0100", "0110")
    assert make_code("elias_runs", 2).words == ("1001", "01", "", "00", "1000")


def test_both_signs_of_a_magnitude_count_half_in_huffmans_code():
    assert make_code("huffman", 1, [2, 2]).lengths == (2, 1, 2)
    assert make_code("huffman", 2, [1, 2, 4]).lengths == (2, 3, 3, 2, 2)


def _symbols(buckets, num_levels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-num_levels, num_levels + 1, buckets.bucket_of.shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("num_levels", [1, 2, 7, 127])
@pytest.mark.parametrize("sizes", [(0,), (1,), (13,), (63, 64, 65), (640, 0, 7)])
def test_symbols_survive_and_take_the_bits_of_their_words(coder, num_levels, sizes):
    buckets = Buckets.cut(Layout(sizes, 0, 64))
    symbols = _symbols(buckets, num_levels)
    code = make_code(coder, num_levels, list(range(num_levels + 1)))
    packed, byte_lengths = write_symbols(code, symbols, buckets)
    assert torch.equal(read_symbols(code, packed, byte_lengths, buckets), symbols)
    for index, bucket in enumerate(symbols.split(buckets.lengths.tolist())):
        bits = sum(code.width or len(code.words[num_levels + m]) for m in bucket.tolist())
        if code.runs:
            bits += sum(len(elias_omega(run + 1)) for run in _runs(bucket.tolist()))
        assert byte_lengths[index] == (bits + 7) // 8


def _runs(symbols):
    """Lengths of the runs of zeros before each non-zero, and before the end if any are left."""
    text = "".join("0" if symbol == 0 else "1" for symbol in symbols)
    runs = [len(run) for run in text.split("1")]
    return runs if runs[-1] else runs[:-1]


def test_runs_of_zeros_are_coded_as_golomb_and_rice_have_it():
    code = make_code("huffman", 1, [9, 1])
    assert code.runs == "rice" and not code.ones and code.lengths == (1, 0, 1)
    symbols = torch.tensor([0] * 5 + [1, -1] + [0] * 9, dtype=torch.int8)
    packed, _ = write_symbols(code, symbols, Buckets.cut(Layout((16,), 0, 16)))
    # 14 zeros in 3 runs of 5, 0 and 9: 3 << 3 >= 14, k = 2; 5 = "01" + low bits "10", 0 = "1" + "00"; the last run is
    # ceil(9 / 4) zeros; then the words of -1 and 1, "0" and "1".
    assert packed.tolist() == _packed("0100" + "0110" + "100" + "000" + "10")


@pytest.mark.parametrize("zeros", [1, 2, 3, 4, 5, 8, 64, 65, 300])
def test_a_bucket_without_anything_but_zeros_is_a_parameter_and_at_most_two_zeros(zeros):
    code = make_code("huffman", 1, [9, 1])
    packed, byte_lengths = write_symbols(
        code, torch.zeros(zeros, dtype=torch.int8), Buckets.cut(Layout((zeros,), 0, 512))
    )
    assert packed.tolist() == [rice_parameter(zeros, 1)]
    assert not read_symbols(code, packed, byte_lengths, Buckets.cut(Layout((zeros,), 0, 512))).any()


def test_runs_of_ones_among_the_non_zeros_are_coded_too():
    code = make_code("huffman", 3, [90, 9, 0, 0])
    assert code.runs == "rice" and code.ones and code.lengths == (2, 2, 1, 0, 1, 2, 2)
    assert code.words == ("00", "01", "1", "", "0", "10", "11")
    packed, _ = write_symbols(
        code, torch.tensor([1, 0, -1, -3, 1, -1], dtype=torch.int8), Buckets.cut(Layout((6,), 0, 8))
    )
    # One zero in 6 runs: k = 0; runs 0, 1, 0, 0, 0. Of 5 non-zeros four are ones, in 2 runs of 2 and 2: 2 << 1 >= 4,
    # k = 0, the last run is two zeros. Signs of 1, -1, 1, -1; the word of -3.
    assert packed.tolist() == _packed("0000" + "1" + "01" + "111" + "0000" + "001" + "00" + "0101" + "00")


def test_elias_runs_are_the_omega_words_of_the_gaps_then_levels_with_their_signs():
    code = make_code("elias_runs", 3)
    packed, _ = write_symbols(code, torch.tensor([0, 0, -3, 1], dtype=torch.int8), Buckets.cut(Layout((4,), 0, 8)))
    # gaps 2 and 0: omega(3) = 110, omega(1) = 0; -3 = 110 1 and 1 = 0 0, depth by depth 10, 10, 0, 1.
    assert packed.tolist() == _packed("110" + "0" + "10" + "10" + "0" + "1")


def _packed(text):
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]


@pytest.mark.parametrize(("zeros", "runs", "k"), [(0, 1, 0), (2, 1, 0), (3, 1, 1), (16384, 1, 13), (844, 181, 2)])
def test_rices_parameter_is_the_rule_written_down(zeros, runs, k):
    assert rice_parameter(zeros, runs) == k


def test_zeros_and_ones_have_words_up_to_four_fifths_and_are_runs_beyond():
    assert make_code("huffman", 2, [80, 10, 10]).stages == 0
    assert make_code("huffman", 2, [81, 10, 9]).stages == 1
    assert make_code("huffman", 2, [900, 80, 20]).stages == 1
    assert make_code("huffman", 2, [900, 81, 20]).stages == 2
    assert make_code("huffman", 1, [900, 81]).stages == 1  # nothing is left behind the ones


@pytest.mark.parametrize("counts", [[80, 10, 10], [81, 10, 9], [900, 81, 20], [900, 81], [5, 4, 3, 2, 1]])
def test_a_code_is_known_by_its_lengths(counts):
    code = make_code("huffman", len(counts) - 1, counts)
    assert huffman(code.lengths) == code


def test_words_are_laid_out_depth_by_depth():
    # docs/wire_format.md, example 1: first bits of all five, second bits of three, third bits of three.
    code = make_code("huffman", 2, [4, 1, 2])
    assert code.words == ("100", "101", "0", "110", "111")
    packed, _ = write_symbols(code, torch.tensor([0, -2, 1, 0, 2], dtype=torch.int8), Buckets.cut(Layout((5,), 0, 8)))
    assert packed.tolist() == _packed("01101" + "011" + "001") == [0xD6, 0x04]


def test_fixed_width_packs_symbol_plus_s_lowest_bit_first():
    code = make_code("fixed", 7)
    packed, _ = write_symbols(code, torch.tensor([-7, 7, 0], dtype=torch.int8), Buckets.cut(Layout((3,), 0, 8)))
    assert packed.tolist() == [0 + (14 << 4), 7]


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_codes_never_decode_to_symbols_out_of_range(coder):
    buckets = Buckets.cut(Layout((200,), 0, 64))
    code = make_code(coder, 5, [9, 5, 3, 2, 1, 1])
    packed, byte_lengths = write_symbols(code, _symbols(buckets, 5), buckets)
    generator, rejected = torch.Generator().manual_seed(1), 0
    for _ in range(200):
        noise = torch.randint(0, 256, packed.shape, generator=generator).to(torch.uint8)
        try:
            assert read_symbols(code, noise, byte_lengths, buckets).abs().max() <= 5
        except CodeError:
            rejected += 1
    assert rejected > 100
