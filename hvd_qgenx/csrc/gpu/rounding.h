/* Norms, draws and levels: docs/wire_format.md, every operation by its name, so that no compiler joins two of them. */
#ifndef QGENX_GPU_ROUNDING_H
#define QGENX_GPU_ROUNDING_H

#include "group.h"
#include "jobs.h"

namespace qgenx {

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u; }

/* The L2 norm: the smallest float32 whose square is no less than the sum. */
DEVICE float root_of(double squares) {
    float norm = __double2float_rn(__dsqrt_rn(squares)); /* this one, or its neighbour below */
    double square = __dmul_rn(norm, norm);               /* exact */
    return square < squares ? __uint_as_float(__float_as_uint(norm) + 1) : norm;
}

/* Whether a bucket of this norm has any code: 0, and what is not finite, say all of it. */
DEVICE bool has_code(float norm) { return norm > 0.0f && is_finite(norm); }

/* One turn of the chain of 16 lanes: lane j of the first half-warp adds its own coordinate and then the one 16 on. */
DEVICE double add_squares(double sum, float value) {
    double own = value, next = __shfl_xor_sync(ALL, value, 16);
    return __fma_rn(next, next, __fma_rn(own, own, sum)); /* squares of float32 are exact in float64 */
}

/* The upper half of 16 lanes is added to the lower one until one is left, which all lanes get from `first`. */
DEVICE double fold(double sum, int first) {
#pragma unroll
    for (int half = 8; half; half >>= 1) sum = __dadd_rn(sum, __shfl_xor_sync(ALL, sum, half));
    return __shfl_sync(ALL, sum, first);
}

/* Of this lane's coordinates, or of their magnitudes: so a compiler makes float64 of them anew, for which, beside them,
 * there are too few registers. */
template <bool ABS>
DEVICE double add_own(double sum, const float *v) {
#pragma unroll
    for (int t = 0; t < 32; t++) {
        double own = ABS ? fabsf(v[t]) : v[t];
        sum = __fma_rn(own, own, sum);
    }
    return sum;
}

/* The sum of squares of a bucket that its group holds in registers, 16 chains of which go from the first half of a warp
 * to the second, and from warp to warp. AGAIN says that the coordinates are needed again. */
template <bool AGAIN, bool WIDE>
DEVICE double squares_of(const float *v, const Group<WIDE> &group, double *carry) {
    double sum = 0.0;
#pragma unroll 1
    for (int turn = 0; turn < (WIDE ? group.warps : 1); turn++) {
        if (!WIDE || turn == group.warp) {
            if (WIDE && turn) sum = carry[group.lane & 15];
            sum = __shfl_sync(ALL, add_own<false>(sum, v), group.lane & 15);
            sum = add_own<AGAIN>(sum, v);
            if (WIDE && group.lane > 15) carry[group.lane - 16] = sum;
        }
        if (WIDE) __syncthreads();
    }
    if (WIDE) sum = carry[group.lane & 15];
    if (WIDE) __syncthreads();
    return fold(sum, 16);
}

/* Of bits of magnitudes, which rise with them; those of NaN are above those of infinity. */
DEVICE unsigned highest_of(unsigned own) {
#pragma unroll
    for (int half = 16; half; half >>= 1) {
        unsigned other = __shfl_xor_sync(ALL, own, half);
        own = other > own ? other : own;
    }
    return own;
}

template <bool WIDE>
DEVICE float largest_of(const float *v, const Group<WIDE> &group) {
    unsigned most = 0;
#pragma unroll
    for (int t = 0; t < 32; t++) {
        unsigned bits = __float_as_uint(v[t]) & 0x7FFFFFFFu;
        most = bits > most ? bits : most;
    }
    most = highest_of(most);
    if (!WIDE) return __uint_as_float(most);
    if (group.lane == 0) group.board[group.warp] = int(most);
    __syncthreads();
#pragma unroll 1
    for (int warp = 0; warp < group.warps; warp++)
        if (unsigned(group.board[warp]) > most) most = unsigned(group.board[warp]);
    __syncthreads();
    return __uint_as_float(most);
}

/* Norms below have a rounding of their own, and products with those above might not be normal numbers. */
constexpr float SMALL_NORM = 0x1p-80f, LARGE_NORM = 0x1p80f;

DEVICE bool is_plain(float norm) { return norm >= SMALL_NORM && norm <= LARGE_NORM; }

/* A power of two by which values and norm are multiplied first, so that 1 / norm is a normal number. */
DEVICE float scale_of(float norm) { return norm < SMALL_NORM ? 0x1p80f : norm > LARGE_NORM ? 0x1p-80f : 1.0f; }

DEVICE unsigned hash(unsigned x, unsigned high) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) + high;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

/* The level below u, which is the largest of l_0 ... l_(s-1) that is no more. */
DEVICE unsigned level_below(const float *levels, int num_levels, float u) {
    unsigned index = 0;
#pragma unroll
    for (unsigned step = 64; step; step >>= 1)
        if (index + step < unsigned(num_levels) && levels[index + step] <= u) index += step;
    return index;
}

/* How the level below is found: evenly spaced ones need no search, of few there are bins. */
enum class Search { UNIFORM, FEW, ANY };

/* What coordinates of one bucket have in common while they are rounded. */
struct Rounding {
    const Book &book;
    const float *levels, *gaps; /* in shared memory */
    float norm, scale, factor, top;
    unsigned counter, high; /* of the draws */
    unsigned first, second; /* which bytes of two hashes, this lane's and its partner's, its elements take */
};

/* The place between levels in units of 2^-bits of a gap, and the level below. */
DEVICE float place_of(float v, const Rounding &r, unsigned &below) {
    float x = __fmul_rn(__fmul_rn(fabsf(v), r.scale), r.factor);
    below = 0;
    if (r.book.uniform) return fminf(x, r.top);
    float u = fminf(x, 1.0f);
    below = level_below(r.levels, r.book.num_levels, u);
    return __fmul_rn(__fmul_rn(__fsub_rn(u, r.levels[below]), r.gaps[below]), 0x1p31f);
}

/* What receivers will compute of a level, times 2^80, which changes no bit. */
DEVICE float small_level(const Rounding &r, unsigned index) {
    return __fmul_rn(__fmul_rn(r.levels[index], r.norm), 0x1p80f);
}

/* The same under a small norm: between what receivers will compute of the levels, which may be subnormal. */
DEVICE float small_place_of(float v, const Rounding &r, unsigned &below) {
    unsigned s = unsigned(r.book.num_levels);
    float magnitude = __fmul_rn(fabsf(v), 0x1p80f);
    below = 0;
#pragma unroll 1
    while (below < s && small_level(r, below + 1) <= magnitude) below++;
    if (below == s) return 0.0f;
    float low = small_level(r, below), gap = __fsub_rn(small_level(r, below + 1), low);
    return __fmul_rn(__fmul_rn(__fsub_rn(magnitude, low), __fdiv_rn(1.0f, gap)), 0x1p31f);
}

/* floor((round(x) + draw) / 2^bits), where a draw is that many of the random bits, the highest. */
DEVICE unsigned rounded(float x, unsigned random, int bits) {
    return (__float2uint_rn(x) + (random >> (32 - bits))) >> bits;
}

DEVICE unsigned index_of(float v, const Rounding &r, unsigned random, bool small) {
    unsigned below;
    float place = small ? small_place_of(v, r, below) : place_of(v, r, below);
    return below + rounded(place, random, small ? 31 : r.book.draw_bits);
}

/* The index of 0: under a small norm several levels may be 0 to receivers. */
DEVICE unsigned index_of_zero(const Rounding &r) {
    unsigned index = 0, s = r.norm < SMALL_NORM ? unsigned(r.book.num_levels) : 0;
#pragma unroll 1
    while (index < s && small_level(r, index + 1) == 0.0f) index++;
    return index;
}

/* What a bucket's draws begin with; its first element is that coordinate of the vector. */
template <bool WIDE>
DEVICE void set_counter(Rounding &r, const unsigned *key, long long position, const Group<WIDE> &group) {
    int lane = group.lane; /* of two that share a hash, eight apart, the upper makes it for the next turn */
    r.counter = unsigned(position) + key[0] + 16 * (lane & 16) + (lane & 15);
    if (WIDE) r.counter += unsigned(TILE / 2 * group.warp);
    r.high = key[1] + unsigned(position >> 32) * 0x9E3779B9u;
    r.first = lane & 8 ? 0x7654 : 0x1032, r.second = lane & 8 ? 0x3210 : 0x5476; /* the lower one swaps them */
}

DEVICE void set_norm(Rounding &r, float norm) {
    r.top = r.book.uniform ? float(unsigned(r.book.num_levels) << r.book.draw_bits) : 1.0f;
    r.norm = norm;
    r.scale = scale_of(norm);
    r.factor = __fdiv_rn(r.top, __fmul_rn(norm, r.scale));
}

/* The random bits of turns t and t + 1. */
DEVICE void draw_two(const Rounding &r, int t, unsigned &first, unsigned &second) {
    unsigned own = hash(r.counter + 8 * t, r.high), other = __shfl_xor_sync(ALL, own, 8);
    first = __byte_perm(own, other, r.first);
    second = __byte_perm(own, other, r.second);
}

}  // namespace qgenx

#endif
