/* Runs of zeros, or of ones among what is not zero, between the elements that end them. */
#ifndef QGENX_GPU_RUNS_H
#define QGENX_GPU_RUNS_H

#include "code.h"

namespace qgenx {

enum { NO_RUNS = 0, RICE = 1, OMEGA = 2 };
constexpr int MOST_BUCKET = 16384;

/* The smallest k for which 2^(k+1) times the runs are no fewer than what is in them. */
DEVICE int rice_parameter(int inside, int runs) {
    int k = 0;
    while ((runs << (k + 1)) < inside) k++;
    return k;
}

/* Elias omega's word of n, 1 to 16385: first bit lowest. */
DEVICE unsigned omega_word(unsigned n, int &length) {
    unsigned word = 0; /* first bit highest while it is made, from its end */
    length = 1;
    while (n > 1) {
        int bits = 32 - __clz(n);
        word |= n << length;
        length += bits;
        n = unsigned(bits - 1);
    }
    return __brev(word) >> (32 - length);
}

/* Bits of a gap's word, and the word itself, with the zeros before it left out. */
DEVICE int gap_bits(int kind, int gap, int k) {
    int length = 0;
    if (kind == OMEGA) omega_word(unsigned(gap + 1), length);
    return kind == OMEGA ? length : (gap >> k) + 1 + k;
}

DEVICE int put_gap(unsigned *words, int at, int kind, int gap, int k) {
    int length = 0;
    unsigned word = kind == OMEGA ? omega_word(unsigned(gap + 1), length) : (unsigned(gap) & ((1u << k) - 1)) << 1 | 1;
    int zeros = kind == OMEGA ? 0 : gap >> k;
    put(words, at + zeros, word);
    return at + zeros + (kind == OMEGA ? length : 1 + k);
}

/* The run up to the bucket's end. */
DEVICE int put_last(unsigned *words, int at, int kind, int rest, int k, bool own) {
    if (kind == RICE) return at + ((rest + (1 << k) - 1) >> k); /* zeros, which need not be written */
    if (!rest) return at;
    int length;
    unsigned word = omega_word(unsigned(rest + 1), length);
    if (own) put(words, at, word);
    return at + length;
}

/* The runs of elements `of` which are not `ends`, before each end and up to the last element. Every lane goes through
 * the ends of its own chunk, once for their words' lengths and once for the words. */
template <bool WIDE>
DEVICE int write_gaps(int kind, unsigned of, unsigned ends, int cursor, const Group<WIDE> &group, unsigned *words) {
    int elements, runs, highest, first = group.sum_before(__popc(of), elements);
    group.sum_before(__popc(ends), runs);
    int k = kind == RICE ? rice_parameter(elements - runs, runs + 1) : 0;
    if (kind == RICE && group.rank() == 0) put(words, cursor, unsigned(k));
    cursor += kind == RICE ? 4 : 0;
    unsigned up_to = ends ? ~0u >> __clz(ends) : 0;
    int last = ends ? first + __popc(of & up_to) - 1 : -1, before = group.highest_before(last, highest);
    int bits = 0, previous = before;
    for (unsigned left = ends; left; left &= left - 1) {
        int rank = first + __popc(of & ((left & (0u - left)) - 1));
        bits += gap_bits(kind, rank - previous - 1, k);
        previous = rank;
    }
    int total, at = cursor + group.sum_before(bits, total);
    previous = before;
    for (unsigned left = ends; left; left &= left - 1) {
        int rank = first + __popc(of & ((left & (0u - left)) - 1));
        at = put_gap(words, at, kind, rank - previous - 1, k);
        previous = rank;
    }
    return put_last(words, cursor + total, kind, elements - 1 - highest, k, group.rank() == 0);
}

/* Runs of zeros, of ones among the others, the ones' signs; `alive` becomes the coordinates that have words. */
template <bool WIDE>
DEVICE int write_runs(const Book &book, const unsigned *names, unsigned &alive, const Group<WIDE> &group,
                      unsigned *words) {
    unsigned planes[8];
    planes_of(names, planes);
    unsigned larger = (planes[1] | planes[2] | planes[3] | planes[4] | planes[5] | planes[6]) & alive;
    unsigned others = (planes[0] & alive) | larger;
    int cursor = write_gaps(book.runs, alive, others, 0, group, words);
    alive = others;
    if (!book.ones || !group.any(others != 0)) return cursor;
    cursor = write_gaps(RICE, others, larger, cursor, group, words);
    alive = larger;
    return put_plane(words, cursor, planes[7], others & ~larger, group);
}

/* ---- reading ------------------------------------------------------------------------------------------------------- */

/* A gap of at most `left`, which stands for the run up to the end; -1 if there is none. */
DEVICE int get_rice(const unsigned *words, int &at, int end, int k, int left) {
    int most = (left + (1 << k) - 1) >> k, zeros = 0;
    while (zeros < most && at + zeros < end) {
        unsigned window = peek(words, at + zeros);
        int more = window ? __ffs(int(window)) - 1 : 32;
        zeros += more;
        if (window) break;
    }
    if (zeros >= most) {
        at += most;
        return left;
    }
    at += zeros + 1;
    if (at + k > end) return -1;
    int gap = (zeros << k) + int(peek(words, at) & ((1u << k) - 1));
    at += k;
    return gap < left ? gap : -1;
}

DEVICE int get_omega(const unsigned *words, int &at, int end) {
    unsigned value = 1;
    while (at < end && (peek(words, at) & 1)) {
        if (value > 15) return -1; /* a group of so many bits and one more is longer than any bucket */
        int bits = int(value) + 1;
        value = __brev(peek(words, at)) >> (32 - bits);
        at += bits;
        if (value > MOST_BUCKET + 1) return -1;
    }
    at += 1;
    return int(value) - 1;
}

/* One lane reads the gaps between `elements` elements and marks those that end one. Returns how many, -1 if these are no
 * gaps of an encoder. */
DEVICE int read_gaps_alone(int kind, const unsigned *words, int &at, int end, int elements, unsigned *marks) {
    int k = kind == RICE ? int(peek(words, at) & 15) : 0, count = 0, next = 0;
    at += kind == RICE ? 4 : 0;
    while (next < elements) {
        int left = elements - next;
        int gap = kind == RICE ? get_rice(words, at, end, k, left) : get_omega(words, at, end);
        if (at > end || gap < 0 || gap > left) return -1;
        next += gap;
        if (next < elements) marks[next >> 5] |= 1u << (next & 31), count++;
        next++;
    }
    return kind == RICE && k != rice_parameter(elements - count, count + 1) ? -1 : count;
}

/* Of the elements `of` those that end runs; -1 if these bytes are no gaps. */
template <bool WIDE>
DEVICE int read_gaps(int kind, const unsigned *words, int &at, int end, unsigned of, const Group<WIDE> &group,
                     unsigned *marks, unsigned &ends) {
    int elements, first = group.sum_before(__popc(of), elements);
    for (int word = group.rank(); word < 32 * group.warps + 2; word += group.size()) marks[word] = 0;
    group.sync();
    int count = 0;
    if (group.rank() == 0 && at <= end) count = read_gaps_alone(kind, words, at, end, elements, marks);
    count = group.first(at <= end ? count : -1);
    at = group.first(at);
    group.sync();
    ends = expand(peek(marks, first), of);
    group.sync();
    return count;
}

/* The way back from write_runs: `names` of ones. */
template <bool WIDE>
DEVICE bool read_runs(const Book &book, const unsigned *words, int &at, int end, unsigned &alive,
                      const Group<WIDE> &group, unsigned *marks, unsigned *names) {
    unsigned others, larger;
    int count = read_gaps(book.runs, words, at, end, alive, group, marks, others);
    if (count < 0) return false;
    alive = others;
    if (!book.ones || !count) return true;
    if (read_gaps(RICE, words, at, end, others, group, marks, larger) < 0) return false;
    unsigned planes[8] = {}, ones = others & ~larger;
    int total, place = at + group.sum_before(__popc(ones), total);
    at += total;
    if (at > end) return false;
    planes[0] = ones;
    planes[7] = expand(peek(words, place), ones);
    bytes_of(planes, names);
    alive = larger;
    return true;
}

}  // namespace qgenx

#endif
