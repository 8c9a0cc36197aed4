/* Few levels and canonical words of up to eight bits without runs, which is what most gradients have: what of rounding,
 * writing and reading is cheaper for them. A bucket has one warp. Lanes keep the tables in a register each, and look up
 * by shuffles.
 */
#ifndef QGENX_GPU_FEW_H
#define QGENX_GPU_FEW_H

#include "code.h"
#include "rounding.h"

namespace qgenx {

constexpr int PLANES = 8;

/* ---- rounding ------------------------------------------------------------------------------------------------------ */

/* What lane 2 index + [v < 0] knows of a symbol: what receivers compute of its magnitude; and its word in the highest
 * byte, with one in the index's counter of three bits. */
struct Symbol {
    float decoded;
    unsigned word;
};

/* How often each of eight indices was drawn by this lane, which draws 32 times. */
struct Counts {
    unsigned recent = 0, even = 0, odd = 0; /* three bits for each; then six, for every second one */
    /* After seven words at most. What they overflow with is lost at the upper end, where it does not matter. */
    DEVICE_MEMBER void settle() {
        even += recent & 007070707u;
        odd += recent >> 3 & 007070707u;
        recent = 0;
    }
};

DEVICE unsigned sum_of_lanes(unsigned own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(ALL, own);
#else
#pragma unroll
    for (int half = 16; half; half >>= 1) own += __shfl_xor_sync(ALL, own, half);
    return own;
#endif
}

/* The sums of two neighbouring counters of six bits, each in 16. */
DEVICE unsigned sum_of_two(unsigned counters) { return sum_of_lanes((counters & 63) | (counters >> 6 & 63) << 16); }

/* What the warp has drawn is added to the block's counters: lanes 0 to 3 have two of them each. */
DEVICE void count_few(const Counts &own, int lane, unsigned *counts) {
    unsigned even = sum_of_two(own.even), odd = sum_of_two(own.odd);
    unsigned upper_even = sum_of_two(own.even >> 12), upper_odd = sum_of_two(own.odd >> 12);
    unsigned both = lane & 1 ? (lane & 2 ? upper_odd : odd) : lane & 2 ? upper_even : even;
    unsigned *first = counts + (lane & 1) + 2 * (lane & 2);
    if (lane > 3) return;
    atomicAdd(first, both & 0xFFFF);
    atomicAdd(first + 2, both >> 16);
}

/* A level, and 2^31 over the gap above it. */
struct Level {
    float value, inverse;
};

/* What a lane keeps of the tables, and those in shared memory. */
struct FewTables {
    const Level *levels;
    const unsigned char *bins;
    unsigned next; /* bits of l_(lane + 1), infinite from l_s on, less one */
};

/* The level below u: a bin says how many levels lie in lower ones, and it has one of its own at most. */
DEVICE unsigned few_below(float u, const FewTables &tables) {
    unsigned bin = __float_as_uint(__fadd_rn(u, BIN_START)) >> BIN_SHIFT, below = tables.bins[int(bin) - FIRST_BIN];
    return below + ((__shfl_sync(ALL, tables.next, int(below)) - __float_as_uint(u)) >> 31); /* one if it is no more */
}

/* As `index_of`, under a norm by which nothing need be multiplied first. */
template <Search SEARCH>
DEVICE unsigned few_index(float v, const Rounding &r, unsigned random, const FewTables &tables) {
    float x = __fmul_rn(fabsf(v), r.factor);
    if (SEARCH == Search::UNIFORM) return rounded(fminf(x, r.top), random, r.book.draw_bits);
    float u = fminf(x, 1.0f);
    unsigned below = few_below(u, tables);
    Level level = tables.levels[below];
    return below + rounded(__fmul_rn(__fsub_rn(u, level.value), level.inverse), random, 31);
}

/* Rounds a warp's coordinates; their words go to the rows, and v becomes what rounding adds to magnitudes. */
template <Search SEARCH, bool PLAIN>
DEVICE void round_few(const Rounding &r, float *v, const FewTables &tables, const Symbol &symbol, int lane,
                      Counts &counts, unsigned char *rows) {
    bool small = r.norm < SMALL_NORM;
    unsigned char *own = rows + row_of(lane & 16) + 2 * (lane & 15);
#pragma unroll
    for (int t = 0; t < 32; t += 2) {
        unsigned draws[2], words[2];
        draw_two(r, t, draws[0], draws[1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float value = v[t + i];
            unsigned index =
                PLAIN ? few_index<SEARCH>(value, r, draws[i], tables) : index_of(value, r, draws[i], small);
            /* 2 index + [v < 0]. The index of -0 is 0, whose word has no sign, but where several levels are 0 at once. */
            float sign = PLAIN || value < 0.0f ? value : 0.0f;
            int name = int(__funnelshift_l(__float_as_uint(sign), index, 1));
            words[i] = __shfl_sync(ALL, symbol.word, name);
            v[t + i] = __fsub_rn(__shfl_sync(ALL, symbol.decoded, name), fabsf(value));
        }
        counts.recent += words[0] + words[1];
        if (t % 6 == 4 || t == 30) counts.settle();
        /* The two are 16 apart in their chunk; `read_few_row` puts them there. */
        *reinterpret_cast<unsigned short *>(own + ROW * (t / 2)) =
            (unsigned short)__byte_perm(words[0], words[1], 0x73);
    }
}

/* A lane's chunk, whose coordinates i and i + 16 lie side by side. */
DEVICE void read_few_row(const unsigned char *rows, int lane, unsigned *bytes) {
    unsigned pairs[8];
    read_row(rows, lane, pairs);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        bytes[q] = __byte_perm(pairs[2 * q], pairs[2 * q + 1], 0x6420);
        bytes[4 + q] = __byte_perm(pairs[2 * q], pairs[2 * q + 1], 0x7531);
    }
}

/* ---- words --------------------------------------------------------------------------------------------------------- */

/* Which elements' words have more than their first d + 1 bits: those that are no less than a limit, as numbers. From the
 * last bit to the first it is the majority of the bit, of the result so far and of the complement of the limit's. */
DEVICE unsigned goes_on_few(const Book &book, const unsigned *planes, int d) {
    unsigned result = book.more[d];
#pragma unroll
    for (int j = d; j >= 0; j--) result = (planes[j] & (result | book.below[d][j])) | (result & book.below[d][j]);
    return result;
}

/* Where a lane's bits of a plane begin that every element has. */
DEVICE int first_of(int count, int lane) { return 32 * lane < count ? 32 * lane : count; }

/* The words of a bucket's elements, into zeros; how many bits they have. */
DEVICE int write_few_words(const Book &book, const unsigned *planes, int count, const Group<false> &group,
                           unsigned *words) {
    unsigned alive = chunk_mask(count, group.lane), next = 0;
    int cursor = 0, before = 0, totals = 0;
#pragma unroll
    for (int d = 0; d < PLANES; d++) {
        if (d >= book.depth) break;
        if (d < book.shortest) {
            put_all(words, cursor + first_of(count, group.lane), planes[d] & alive);
            cursor += count;
            if (d + 1 == book.shortest) alive &= goes_on_few(book, planes, d);
            continue;
        }
        if ((d - book.shortest) % 2 == 0) { /* the bits of two planes are counted at once */
            next = alive & goes_on_few(book, planes, d);
            before = group.sum_before(__popc(alive) | __popc(next) << 16, totals);
        }
        put_all(words, cursor + (before & 0xFFFF), compress(planes[d], alive));
        cursor += totals & 0xFFFF;
        before >>= 16, totals >>= 16;
        alive = (d - book.shortest) % 2 == 0 ? next : alive & goes_on_few(book, planes, d);
    }
    return cursor;
}

/* The way back; false if these bytes are no code. `at` and `end` are bits of `words`. */
DEVICE bool read_few_words(const Book &book, const unsigned *words, int at, int end, int count,
                           const Group<false> &group, unsigned *planes) {
    unsigned alive = chunk_mask(count, group.lane);
#pragma unroll
    for (int d = 0; d < PLANES; d++) planes[d] = 0;
#pragma unroll
    for (int d = 0; d < PLANES; d++) {
        if (d >= book.depth) break;
        int total = count, place = at + first_of(count, group.lane);
        if (d >= book.shortest) place = at + group.sum_before(__popc(alive), total);
        at += total;
        if (at > end) return false;
        unsigned bits = peek(words, place);
        planes[d] = d < book.shortest ? bits & alive : expand(bits, alive);
        if (d + 1 >= book.shortest) alive &= goes_on_few(book, planes, d);
    }
    return !group.any(alive != 0) && is_end(words, at, end);
}

}  // namespace qgenx

#endif
