/* What is done to one bucket: its norm, rounding, code and the way back. Two paths fill this table. */
#ifndef QGENX_KERNELS_H
#define QGENX_KERNELS_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "checksum.h"
#include "code.h"

namespace qgenx {

constexpr int PAD = 256; /* elements behind every buffer that kernels may read or write in whole vectors */

/* Memory that will be needed next, asked for line by line while there is other work. */
struct Ahead {
    const char *next = nullptr, *end = nullptr;

    inline void lines(int count) {
#if defined(__GNUC__)
        for (; count > 0 && next < end; count--, next += 64) __builtin_prefetch(next, 1);
#endif
    }
};

/* Memory of one thread for buckets of up to `bucket` elements, never shared. */
struct Scratch {
    Ahead ahead;
    int masks; /* of 64 bits that cover a bucket, a multiple of four */
    std::unique_ptr<int8_t[]> symbols;
    std::unique_ptr<uint8_t[]> indices;    /* symbols too, on the way back */
    std::unique_ptr<uint16_t[]> positions; /* of the elements behind a bucket's runs, then of those behind the ones' */
    std::unique_ptr<float[]> scaled;
    std::unique_ptr<uint8_t[]> bytes;
    std::unique_ptr<uint64_t[]> passing; /* [node][mask]: elements whose code word begins with the node's prefix */
    std::unique_ptr<uint64_t[]> planes;  /* [bit][mask]: 16 of the code words, and two more masks */

    Scratch(int bucket, int nodes)
        : masks((bucket + 255) / 256 * 4),
          symbols(new int8_t[bucket + PAD]),
          indices(new uint8_t[bucket + PAD]),
          positions(new uint16_t[2 * (bucket + 1)]),
          scaled(new float[bucket + PAD]),
          bytes(new uint8_t[size_t(bucket) * SYMBOL_MOST_BITS / 8 + bucket / 8 + 3 * PAD]),
          passing(new uint64_t[size_t(nodes > 0 ? nodes : 1) * masks]()),
          planes(new uint64_t[size_t(18) * masks]()) {}
};

/* The L2 norm: the smallest float32 whose square is not below the sum, so that no value is above it. */
inline float l2_of(double squares) {
    float norm = float(std::sqrt(squares)); /* this one, or its neighbour below; the square is exact in float64 */
    return double(norm) * double(norm) < squares ? std::nextafter(norm, INFINITY) : norm;
}

/* Norms below have a rounding of their own, and products with those above might not be normal numbers. */
constexpr float SMALL_NORM = 0x1p-80f, LARGE_NORM = 0x1p80f;

/* A power of two by which values and norm are multiplied first, so that 1 / norm is a normal number. */
inline float scale_of(float norm) { return norm < SMALL_NORM ? 0x1p80f : norm > LARGE_NORM ? 0x1p-80f : 1.0f; }

/* A bucket's place among the draws: where it begins in the vector, and the key. */
struct Draws {
    uint64_t position;
    uint32_t key[2];

    /* 32 random bits of an element: a hash that it shares with one eight places away, which has the halves swapped. */
    inline uint32_t of(int i) const {
        uint32_t x = key[0] + uint32_t(position) + uint32_t(i / 16 * 8 + i % 8);
        x ^= x >> 16;
        x *= 0x7FEB352Du;
        x ^= x >> 15;
        x += key[1] + uint32_t(position >> 32) * 0x9E3779B9u;
        x *= 0x846CA68Bu;
        x ^= x >> 16;
        return i & 8 ? x : x << 16 | x >> 16;
    }
};

/* floor((round(x) + draw) / 2^bits), where a draw is that many of the random bits, the highest. */
inline int rounded(float x, uint32_t random, int bits) {
    return int((uint32_t(std::llrint(x)) + (random >> (32 - bits))) >> bits);
}

/* What makes a mean of the sum: each value is divided, then multiplied. */
struct Finish {
    float divisor = 1.0f, factor = 1.0f;

    bool is_needed() const { return divisor != 1.0f || factor != 1.0f; }
    float of(float sum) const { return sum / divisor * factor; } /* by one, neither changes a bit */
};

struct Kernels {
    /* The sum of squares in float64, in 16 lanes as docs/wire_format.md has it; not finite if a value is not. */
    double (*squares)(const float *values, int n);
    /* The largest magnitude; infinite or NaN if a value is. */
    float (*largest)(const float *values, int n);
    /* Symbols of a bucket whose norm is finite and not zero, and zeros behind them up to a multiple of 64. */
    void (*round)(const Code &code, const float *values, int n, float norm, const Draws &draws, int8_t *symbols,
                  Scratch &scratch);
    /* Adds how often each index 0 ... s occurs among symbols, behind which are zeros as above. */
    void (*count)(const int8_t *symbols, int n, int num_levels, uint64_t *counts);
    /* The sum of (decoded - value)^2, each difference rounded to float32, in lanes like `squares`. */
    double (*error)(const Code &code, const int8_t *symbols, const float *values, int n, float norm);
    /* The bytes of a bucket's code; `out` has room for most_bytes. */
    int (*encode)(const Code &code, const int8_t *symbols, int n, uint8_t *out, Scratch &scratch);
    /* Adds a bucket whose norm is above zero to `out`, or to zeros, and finishes the sums; returns NULL, or why these
     * bytes are no code. */
    const char *(*decode)(const Code &code, const uint8_t *bytes, int size, int n, float norm, float *out, bool add,
                          const Finish &finish, Scratch &scratch);
    /* Adds a bucket's normalised magnitudes to QGENX_NUM_BINS bins of both histograms, `weight` each to one of them. */
    void (*histogram)(const float *values, int n, float norm, uint32_t weight, int64_t *weighted, int64_t *plain,
                      Scratch &scratch);
    /* The sums of 1, r and r^2 over a bucket, in units of 2^-16, and these times `weight` in units of one. */
    void (*moments)(const float *values, int n, float norm, uint32_t weight, int64_t *weighted, int64_t *plain,
                    Scratch &scratch);
    Checksum crc;

    /* Infinite or NaN if it, or a value, is not finite. */
    float norm(uint32_t kind, const float *values, int n) const {
        return kind == QGENX_L2 ? l2_of(squares(values, n)) : largest(values, n);
    }
};

const Kernels &portable_kernels();
#if defined(__x86_64__) && defined(__GNUC__)
#define QGENX_HAS_AVX2 1
const Kernels &avx2_kernels();
#endif

}  // namespace qgenx

#endif
