/* The path for x86-64 with AVX2, BMI2 and FMA. The rest of the library is compiled without them and asks first. */
#include "kernels.h"

#ifdef QGENX_HAS_AVX2

#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,fma,popcnt,lzcnt,sse4.2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,popcnt,lzcnt,sse4.2")
#endif

namespace qgenx {
namespace avx2 {
namespace {

inline unsigned popcount(uint64_t x) { return unsigned(_mm_popcnt_u64(x)); }
inline int lowest(uint64_t x) { return int(_tzcnt_u64(x)); }
inline uint64_t pext(uint64_t x, uint64_t mask) { return _pext_u64(x, mask); }
inline uint64_t pdep(uint64_t x, uint64_t mask) { return _pdep_u64(x, mask); }

inline __m256i load(const void *at) { return _mm256_loadu_si256(static_cast<const __m256i *>(at)); }
inline void store(void *at, __m256i value) { _mm256_storeu_si256(static_cast<__m256i *>(at), value); }
inline __m256i twice(const void *sixteen_bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(sixteen_bytes)));
}

inline uint64_t top_bits(__m256i low, __m256i high) {
    return uint64_t(uint32_t(_mm256_movemask_epi8(low))) | uint64_t(uint32_t(_mm256_movemask_epi8(high))) << 32;
}

/* Which of 64 symbols have a magnitude above `least`, which are negative. */
inline uint64_t above_mask(const int8_t *symbols, int least) {
    __m256i bound = _mm256_set1_epi8(char(least));
    __m256i low = _mm256_abs_epi8(load(symbols)), high = _mm256_abs_epi8(load(symbols + 32));
    return top_bits(_mm256_cmpgt_epi8(low, bound), _mm256_cmpgt_epi8(high, bound));
}

inline uint64_t negative_mask(const int8_t *symbols) { return top_bits(load(symbols), load(symbols + 32)); }

#include "avx2_words.inl"

/* ---- symbols to values ------------------------------------------------------------------------------------------- */

/* In place, from symbol + s; false if one is above 2 s. Reads and writes whole vectors. */
bool codes_to_symbols(uint8_t *codes, int n, int num_levels) {
    const __m256i offset = _mm256_set1_epi8(char(num_levels));
    __m256i largest = _mm256_setzero_si256();
    memset(codes + n, num_levels, 32);
    for (int i = 0; i < n; i += 32) {
        __m256i code = load(codes + i);
        largest = _mm256_max_epu8(largest, code);
        store(codes + i, _mm256_sub_epi8(code, offset));
    }
    alignas(32) uint8_t all[32];
    store(all, largest);
    for (int i = 0; i < 32; i++)
        if (all[i] > 2 * num_levels) return false;
    return true;
}

/* Symbols of four bits, two a byte, the first lower. Writes whole vectors. */
void pack_nibbles(const int8_t *symbols, int n, int num_levels, uint8_t *out) {
    const __m256i offset = _mm256_set1_epi8(char(num_levels)), weights = _mm256_set1_epi16(0x1001);
    for (int i = 0; i < n; i += 64) {
        __m256i low = _mm256_maddubs_epi16(_mm256_add_epi8(load(symbols + i), offset), weights);
        __m256i high = _mm256_maddubs_epi16(_mm256_add_epi8(load(symbols + i + 32), offset), weights);
        store(out + i / 2, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8));
    }
}

void unpack_nibbles(const uint8_t *bytes, int n, uint8_t *codes) {
    const __m256i low = _mm256_set1_epi16(0x0F), high = _mm256_set1_epi16(0x0F00);
    for (int i = 0; i < n; i += 32) {
        __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + i / 2)));
        __m256i second = _mm256_and_si256(_mm256_slli_epi16(pairs, 4), high);
        store(codes + i, _mm256_or_si256(_mm256_and_si256(pairs, low), second));
    }
}

/* A table of 16 floats, a vector for each of their bytes: 32 values are looked up by their bytes. */
struct FewValues {
    __m256i bytes[4];

    explicit FewValues(const float *table) {
        const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m128i four[4];
        for (int i = 0; i < 4; i++)
            four[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table + 4 * i)), by_byte);
        __m128i a = _mm_unpacklo_epi32(four[0], four[1]), b = _mm_unpackhi_epi32(four[0], four[1]);
        __m128i c = _mm_unpacklo_epi32(four[2], four[3]), d = _mm_unpackhi_epi32(four[2], four[3]);
        bytes[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, c));
        bytes[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, c));
        bytes[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(b, d));
        bytes[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(b, d));
    }

    /* Of 32 symbols by their lowest four bits; value[k] holds those of 8 k and on. */
    inline void of(const uint8_t *symbols, __m256i *value) const {
        const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); /* since bytes are joined in halves */
        __m256i nibbles = _mm256_and_si256(load(symbols), _mm256_set1_epi8(15));
        nibbles = _mm256_permutevar8x32_epi32(nibbles, order);
        __m256i a = _mm256_shuffle_epi8(bytes[0], nibbles), b = _mm256_shuffle_epi8(bytes[1], nibbles);
        __m256i c = _mm256_shuffle_epi8(bytes[2], nibbles), d = _mm256_shuffle_epi8(bytes[3], nibbles);
        __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpacklo_epi8(c, d);
        value[0] = _mm256_unpacklo_epi16(low, high);
        value[1] = _mm256_unpackhi_epi16(low, high);
        low = _mm256_unpackhi_epi8(a, b), high = _mm256_unpackhi_epi8(c, d);
        value[2] = _mm256_unpacklo_epi16(low, high);
        value[3] = _mm256_unpackhi_epi16(low, high);
    }
};

inline __m256 gather(const float *table, const uint8_t *symbols) {
    __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(symbols)));
    return _mm256_i32gather_ps(table, index, 4);
}

/* What is done to a sum, and what with. */
enum class End { SUM, DIVIDED, SCALED };

struct Ending {
    __m256 divisor, factor;
};

template <bool ADD, End END>
inline void add_to(float *out, __m256 value, const Ending &by) {
    __m256 sum = _mm256_add_ps(ADD ? _mm256_loadu_ps(out) : _mm256_setzero_ps(), value);
    if (END != End::SUM) sum = _mm256_div_ps(sum, by.divisor);
    if (END == End::SCALED) sum = _mm256_mul_ps(sum, by.factor);
    _mm256_storeu_ps(out, sum);
}

/* How values are found: of at most 16 by their bytes; of evenly spaced levels, which are symbol / s rounded to float32,
 * by that division; of all others in a table. */
enum class Values { FEW, EVEN, MANY };

template <Values VALUES>
struct Finder {
    FewValues few;
    const float *table;
    __m256 num_levels, norm;

    Finder(const float *values, int s)
        : few(values), table(values), num_levels(_mm256_set1_ps(float(s))), norm(_mm256_set1_ps(values[s])) {}

    inline void of(const uint8_t *symbols, __m256i *value) const {
        if (VALUES == Values::FEW) return few.of(symbols, value);
        for (int k = 0; k < 4; k++, symbols += 8)
            value[k] = _mm256_castps_si256(VALUES == Values::EVEN ? even(symbols) : gather(table, symbols));
    }

    inline __m256 even(const uint8_t *symbols) const {
        __m256i symbol = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(symbols)));
        return _mm256_mul_ps(_mm256_div_ps(_mm256_cvtepi32_ps(symbol), num_levels), norm);
    }
};

template <Values VALUES, bool ADD, End END>
void accumulate_as(const uint8_t *symbols, int n, const float *table, int num_levels, float *out, const Finish &finish,
                   Ahead &ahead) {
    Finder<VALUES> values(table, num_levels);
    Ending by{_mm256_set1_ps(finish.divisor), _mm256_set1_ps(finish.factor)};
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        ahead.lines(2);
        __m256i value[4];
        values.of(symbols + i, value);
        for (int k = 0; k < 4; k++) add_to<ADD, END>(out + i + 8 * k, _mm256_castsi256_ps(value[k]), by);
    }
    for (; i < n; i++) out[i] = finish.of((ADD ? out[i] : 0.0f) + table[symbols[i]]);
}

template <Values VALUES>
void accumulate_by(const uint8_t *symbols, int n, const float *table, int num_levels, float *out, bool add,
                   const Finish &finish, Ahead &ahead) {
    using Run = void (*)(const uint8_t *, int, const float *, int, float *, const Finish &, Ahead &);
    static const Run runs[2][3] = {{accumulate_as<VALUES, false, End::SUM>, accumulate_as<VALUES, false, End::DIVIDED>,
                                    accumulate_as<VALUES, false, End::SCALED>},
                                   {accumulate_as<VALUES, true, End::SUM>, accumulate_as<VALUES, true, End::DIVIDED>,
                                    accumulate_as<VALUES, true, End::SCALED>}};
    End end = finish.factor != 1.0f ? End::SCALED : finish.divisor != 1.0f ? End::DIVIDED : End::SUM;
    runs[add][int(end)](symbols, n, table, num_levels, out, finish, ahead);
}

Values values_of(const Code &code) {
    return code.few ? Values::FEW : code.search == Search::UNIFORM ? Values::EVEN : Values::MANY;
}

void accumulate(const Code &code, const uint8_t *symbols, int n, const float *table, float *out, bool add,
                const Finish &finish, Ahead &ahead) {
    Values values = values_of(code);
    auto run = values == Values::FEW    ? accumulate_by<Values::FEW>
               : values == Values::EVEN ? accumulate_by<Values::EVEN>
                                        : accumulate_by<Values::MANY>;
    run(symbols, n, table, code.num_levels, out, add, finish, ahead);
}

#include "avx2_round.inl"
#include "bits.inl"
#include "words.inl"
#include "runs.inl"
#include "bucket.inl"

/* ---- squares ----------------------------------------------------------------------------------------------------- */

/* 16 sums in float64, folded in halves at the end. */
struct Lanes {
    __m256d sums[4];

    Lanes() { /* written out: an implicit constructor would be compiled without AVX2 */
        for (__m256d &sum : sums) sum = _mm256_setzero_pd();
    }

    /* A fused multiply-add rounds as an addition here, since a float32's square is exact in float64. */
    inline void add_squares(int part, __m128 four) {
        __m256d x = _mm256_cvtps_pd(four);
        sums[part] = _mm256_fmadd_pd(x, x, sums[part]);
    }

    inline double fold() const {
        __m256d four = _mm256_add_pd(_mm256_add_pd(sums[0], sums[2]), _mm256_add_pd(sums[1], sums[3]));
        __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
    }
};

double squares(const float *values, int n) {
    Lanes lanes;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int part = 0; part < 4; part++) lanes.add_squares(part, _mm_loadu_ps(values + i + 4 * part));
    if (i < n) {
        float rest[16] = {};
        memcpy(rest, values + i, size_t(n - i) * sizeof(float));
        for (int part = 0; part < 4; part++) lanes.add_squares(part, _mm_loadu_ps(rest + 4 * part));
    }
    return lanes.fold();
}

/* Of 32 elements. */
template <Values VALUES>
inline void add_differences(const Finder<VALUES> &decoded, const uint8_t *symbols, const float *values, Lanes &lanes) {
    __m256i value[4];
    decoded.of(symbols, value);
    for (int k = 0; k < 4; k++) {
        __m256 difference = _mm256_sub_ps(_mm256_castsi256_ps(value[k]), _mm256_loadu_ps(values + 8 * k));
        lanes.add_squares(k % 2 * 2, _mm256_castps256_ps128(difference));
        lanes.add_squares(k % 2 * 2 + 1, _mm256_extractf128_ps(difference, 1));
    }
}

template <Values VALUES>
double error_by(const Code &code, const uint8_t *symbols, const float *values, int n, const float *table) {
    Finder<VALUES> decoded(table, code.num_levels);
    Lanes lanes;
    int i = 0;
    for (; i + 32 <= n; i += 32) add_differences(decoded, symbols + i, values + i, lanes);
    if (i < n) {
        float rest[32] = {}; /* as the symbols behind the last: no difference, which changes no sum */
        memcpy(rest, values + i, size_t(n - i) * sizeof(float));
        add_differences(decoded, symbols + i, rest, lanes);
    }
    return lanes.fold();
}

double error_of(const Code &code, const int8_t *symbols, const float *values, int n, float norm) {
    float table[256];
    list_values(code, norm, table);
    Values values_by = values_of(code);
    auto run = values_by == Values::FEW    ? error_by<Values::FEW>
               : values_by == Values::EVEN ? error_by<Values::EVEN>
                                           : error_by<Values::MANY>;
    return run(code, reinterpret_cast<const uint8_t *>(symbols), values, n, table);
}

float largest(const float *values, int n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i one = _mm256_setzero_si256(), two = one;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        one = _mm256_max_epu32(one, _mm256_and_si256(load(values + i), magnitude));
        two = _mm256_max_epu32(two, _mm256_and_si256(load(values + i + 8), magnitude));
    }
    alignas(32) uint32_t lanes[8];
    store(lanes, _mm256_max_epu32(one, two));
    uint32_t largest = 0;
    for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
    for (; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        bits &= 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    float found;
    memcpy(&found, &largest, 4);
    return found;
}

/* ---- counts of at most 15 levels -------------------------------------------------------------------------------- */

/* How many of up to 255 vectors' magnitudes are `first` and each of the next COUNT - 1. */
template <int COUNT>
inline void count_magnitudes(const int8_t *symbols, int vectors, int first, uint64_t *counts) {
    __m256i found[COUNT];
    for (__m256i &one : found) one = _mm256_setzero_si256();
    for (int v = 0; v < vectors; v++) {
        __m256i magnitude = _mm256_abs_epi8(load(symbols + 32 * v));
        for (int k = 0; k < COUNT; k++)
            found[k] = _mm256_sub_epi8(found[k], _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(char(first + k))));
    }
    for (int k = 0; k < COUNT; k++) {
        alignas(32) uint64_t sums[4];
        store(sums, _mm256_sad_epu8(found[k], _mm256_setzero_si256()));
        counts[first + k] += sums[0] + sums[1] + sums[2] + sums[3];
    }
}

/* The zeros are what is left of n, so that those behind the last symbol do not count. */
void count(const int8_t *symbols, int n, int num_levels, uint64_t *counts) {
    if (num_levels > 15) return count_symbols(symbols, n, num_levels, counts);
    uint64_t found[16] = {};
    for (int i = 0; i < n; i += 32 * 255) {
        int vectors = (n - i + 31) / 32 < 255 ? (n - i + 31) / 32 : 255;
        if (num_levels < 4) {
            count_magnitudes<3>(symbols + i, vectors, 1, found);
            continue;
        }
        count_magnitudes<7>(symbols + i, vectors, 1, found);
        if (num_levels > 7) count_magnitudes<8>(symbols + i, vectors, 8, found);
    }
    uint64_t zeros = uint64_t(n);
    for (int index = 1; index <= num_levels; index++) {
        counts[index] += found[index];
        zeros -= found[index];
    }
    counts[0] += zeros;
}

/* ---- checksum ---------------------------------------------------------------------------------------------------- */

uint32_t crc_serial(uint32_t crc, const uint8_t *data, uint64_t size) {
    uint64_t state = crc;
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t eight;
        memcpy(&eight, data, 8);
        state = _mm_crc32_u64(state, eight);
    }
    for (; size; size--) state = _mm_crc32_u8(uint32_t(state), *data++);
    return uint32_t(state);
}

/* Three pieces at once, since each instruction waits for the one before. */
uint32_t crc(uint32_t crc, const uint8_t *data, uint64_t size) {
    uint64_t piece = size / 24 * 8;
    if (piece < 512) return ~crc_serial(~crc, data, size);
    uint64_t first = ~crc, second = 0, third = 0;
    for (uint64_t i = 0; i < piece; i += 8) {
        uint64_t eight[3];
        memcpy(eight, data + i, 8);
        memcpy(eight + 1, data + piece + i, 8);
        memcpy(eight + 2, data + 2 * piece + i, 8);
        first = _mm_crc32_u64(first, eight[0]);
        second = _mm_crc32_u64(second, eight[1]);
        third = _mm_crc32_u64(third, eight[2]);
    }
    uint32_t joined = crc_shift(crc_shift(uint32_t(first), piece) ^ uint32_t(second), piece) ^ uint32_t(third);
    return ~crc_serial(joined, data + 3 * piece, size - 3 * piece);
}

}  // namespace
}  // namespace avx2

const Kernels &avx2_kernels() {
    using namespace avx2;
    static const Kernels kernels{squares,       largest,       round_bucket,     count,          error_of,
                                 encode_bucket, decode_bucket, histogram_bucket, moments_bucket, crc};
    return kernels;
}

}  // namespace qgenx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
