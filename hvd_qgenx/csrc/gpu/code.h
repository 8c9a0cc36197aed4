/* A bucket's words, plane by plane, and the way back; and the fixed code. */
#ifndef QGENX_GPU_CODE_H
#define QGENX_GPU_CODE_H

#include "bits.h"
#include "group.h"
#include "jobs.h"

namespace qgenx {

/* Which elements' words have more than their first d + 1 bits. */
template <int PLANES>
DEVICE unsigned goes_on(const Book &book, const unsigned *planes, int d) {
    unsigned result = 0;
#pragma unroll 1
    for (int i = 0; i < book.num_intervals[d + 1]; i++) {
        const int *interval = book.intervals[d + 1][i];
        result |=
            no_less<PLANES>(planes, unsigned(interval[0]), d) & ~no_less<PLANES>(planes, unsigned(interval[1]), d);
    }
    return result;
}

/* Bits of this lane's chunk at the ones of a mask, behind those of the chunks before; returns the cursor behind all. */
template <bool WIDE>
DEVICE int put_plane(unsigned *words, int cursor, unsigned bits, unsigned mask, const Group<WIDE> &group) {
    int total, at = group.sum_before(__popc(mask), total);
    put(words, cursor + at, compress(bits, mask));
    return cursor + total;
}

/* The words of the elements in `alive`; returns the cursor behind them. */
template <int PLANES, bool WIDE>
DEVICE int write_words(const Book &book, const unsigned *planes, unsigned alive, int cursor, bool dense,
                       const Group<WIDE> &group, unsigned *words) {
#pragma unroll
    for (int d = 0; d < PLANES; d++) {
        if (d >= book.depth) break;
        int total, at = group.sum_before(__popc(alive), total);
        bool whole = dense && d < book.shortest; /* all of a chunk's elements have this bit, and they lie close */
        put(words, cursor + at, whole ? planes[d] & alive : compress(planes[d], alive));
        cursor += total;
        alive &= goes_on<PLANES>(book, planes, d);
    }
    return cursor;
}

/* The planes of the elements in `alive`; false if these bytes are no code. `at` and `end` are bits of `words`. */
template <int PLANES, bool WIDE>
DEVICE bool read_words(const Book &book, const unsigned *words, int &at, int end, unsigned alive, bool dense,
                       const Group<WIDE> &group, unsigned *planes) {
#pragma unroll
    for (int d = 0; d < PLANES; d++) planes[d] = 0;
#pragma unroll
    for (int d = 0; d < PLANES; d++) {
        if (d >= book.depth) break;
        int total, place = at + group.sum_before(__popc(alive), total);
        at += total;
        if (at > end) return false;
        unsigned bits = peek(words, place);
        planes[d] = dense && d < book.shortest ? bits & alive : expand(bits, alive);
        alive &= goes_on<PLANES>(book, planes, d);
    }
    return !group.any(alive != 0);
}

/* Whether there is nothing behind the words but zeros that fill the last byte. */
DEVICE bool is_end(const unsigned *words, int at, int end) {
    return at <= end && end - at < 8 && !(peek(words, at) & ((1u << ((end - at) & 7)) - 1));
}

/* ---- fixed width: a chunk's 32 symbols fill `width` words ---------------------------------------------------------- */

DEVICE unsigned byte_of(const unsigned *bytes, int i) { return bytes[i >> 2] >> 8 * (i & 3) & 255; }

/* symbol + s */
DEVICE unsigned number_of(unsigned name, int num_levels) {
    int index = int(name & 127);
    return unsigned(num_levels + (name & 128 ? -index : index));
}

template <bool WIDE>
DEVICE int write_fixed(const Book &book, const unsigned *names, int count, const Group<WIDE> &group, unsigned *words) {
    int first = 32 * group.chunk(), place = group.chunk() * book.width, filled = 0;
    unsigned long long bits = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        unsigned number = first + i < count ? number_of(byte_of(names, i), book.num_levels) : 0;
        bits |= (unsigned long long)number << filled;
        filled += book.width;
        if (filled < 32) continue;
        if (32 * place < count * book.width) words[place] = unsigned(bits); /* there is no room behind the bucket */
        place++;
        bits >>= 32;
        filled -= 32;
    }
    return count * book.width;
}

/* Names of this lane's symbols; false if a number is above 2 s. `at` is the first bit. */
template <bool WIDE>
DEVICE bool read_fixed(const Book &book, const unsigned *words, int &at, int count, const Group<WIDE> &group,
                       unsigned *names) {
    int first = 32 * group.chunk(), place = at + first * book.width;
    bool good = true;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        if (i % 4 == 0) names[i / 4] = 0;
        if (first + i >= count) continue;
        int symbol = int(peek(words, place + i * book.width) & ((1u << book.width) - 1)) - book.num_levels;
        good = good && symbol <= book.num_levels;
        names[i / 4] |= unsigned(symbol < 0 ? 128 - symbol : symbol) << 8 * (i % 4);
    }
    at += count * book.width;
    return !group.any(!good);
}

}  // namespace qgenx

#endif
