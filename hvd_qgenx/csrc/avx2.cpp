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

inline uint64_t nonzero_mask(const int8_t *symbols) {
    __m256i zero = _mm256_setzero_si256();
    return ~top_bits(_mm256_cmpeq_epi8(load(symbols), zero), _mm256_cmpeq_epi8(load(symbols + 32), zero));
}

/* ---- symbols to planes ------------------------------------------------------------------------------------------ */

/* The bits of the code words of 64 symbols, a mask for each depth. */
struct Spread {
    const Code &code;
    const uint8_t *first = code.word_bytes[0], *second = code.word_bytes[1];

    explicit Spread(const Code &c) : code(c) {}

    inline void depths(__m256i low, __m256i high, int from, int to, int stride, uint64_t *plane) const {
        for (int depth = from; depth < to; depth++) {
            plane[depth * stride] = top_bits(low, high);
            low = _mm256_add_epi8(low, low);
            high = _mm256_add_epi8(high, high);
        }
    }

    inline void few(__m256i low, __m256i high, int stride, uint64_t *plane) const {
        __m256i table = twice(first);
        depths(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high), 0, code.depth < 8 ? code.depth : 8,
               stride, plane);
        if (code.depth <= 8) return;
        table = twice(second);
        depths(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high), 8, code.depth, stride, plane);
    }

    inline void many(__m256i low, __m256i high, int stride, uint64_t *plane) const {
        alignas(32) uint8_t index[64], one[64], two[64];
        store(index, low);
        store(index + 32, high);
        for (int i = 0; i < 64; i++) {
            one[i] = first[index[i]];
            two[i] = second[index[i]];
        }
        depths(load(one), load(one + 32), 0, code.depth < 8 ? code.depth : 8, stride, plane);
        if (code.depth > 8) depths(load(two), load(two + 32), 8, code.depth, stride, plane);
    }
};

void word_planes(const Code &code, const int8_t *symbols, int words, int stride, uint64_t *planes, uint64_t *signs,
                 uint64_t *nonzero) {
    Spread spread(code);
    __m256i zero = _mm256_setzero_si256();
    for (int w = 0; w < words; w++) {
        __m256i low = load(symbols + 64 * w), high = load(symbols + 64 * w + 32);
        signs[w] = top_bits(low, high);
        nonzero[w] = ~top_bits(_mm256_cmpeq_epi8(low, zero), _mm256_cmpeq_epi8(high, zero));
        low = _mm256_abs_epi8(low);
        high = _mm256_abs_epi8(high);
        code.num_levels < 16 ? spread.few(low, high, stride, planes + w) : spread.many(low, high, stride, planes + w);
    }
}

/* ---- planes to values ------------------------------------------------------------------------------------------- */

/* Bytes of all ones where the mask of 32 elements has a one. */
inline __m256i spread_mask(const void *mask) {
    const __m256i source = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                                            3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
    uint32_t word;
    memcpy(&word, mask, 4);
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(word)), source);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}

template <int BITS>
inline void index_bytes_of(const uint64_t *bits, const uint64_t *signs, int words, int stride, uint8_t *indices) {
    for (int half = 0; half < 2 * words; half++) {
        __m256i index = _mm256_and_si256(spread_mask(reinterpret_cast<const uint8_t *>(signs) + 4 * half),
                                         _mm256_set1_epi8(-128));
        for (int bit = 0; bit < BITS; bit++) {
            __m256i ones = spread_mask(reinterpret_cast<const uint8_t *>(bits + bit * stride) + 4 * half);
            index = _mm256_or_si256(index, _mm256_and_si256(ones, _mm256_set1_epi8(char(1 << bit))));
        }
        store(indices + 32 * half, index);
    }
}

void index_bytes(const uint64_t *bits, int index_bits, const uint64_t *signs, int words, int stride,
                 uint8_t *indices) {
    switch (index_bits) {
        case 1: return index_bytes_of<1>(bits, signs, words, stride, indices);
        case 2: return index_bytes_of<2>(bits, signs, words, stride, indices);
        case 3: return index_bytes_of<3>(bits, signs, words, stride, indices);
        case 4: return index_bytes_of<4>(bits, signs, words, stride, indices);
        case 5: return index_bytes_of<5>(bits, signs, words, stride, indices);
        case 6: return index_bytes_of<6>(bits, signs, words, stride, indices);
        default: return index_bytes_of<7>(bits, signs, words, stride, indices);
    }
}

/* In place, from symbol + s; false if one is above 2 s. Reads and writes whole vectors. */
bool codes_to_indices(uint8_t *codes, int n, int num_levels) {
    const __m256i offset = _mm256_set1_epi8(char(num_levels)), sign = _mm256_set1_epi8(-128);
    __m256i largest = _mm256_setzero_si256();
    memset(codes + n, num_levels, 32);
    for (int i = 0; i < n; i += 32) {
        __m256i code = load(codes + i), symbol = _mm256_sub_epi8(code, offset);
        largest = _mm256_max_epu8(largest, code);
        store(codes + i, _mm256_or_si256(_mm256_abs_epi8(symbol), _mm256_and_si256(symbol, sign)));
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
        store(codes + i, _mm256_or_si256(_mm256_and_si256(pairs, low), _mm256_and_si256(_mm256_slli_epi16(pairs, 4), high)));
    }
}

/* Eight values of a table of at most eight, the sign in bit 7 of each index. */
inline __m256 look_up(__m256 table, const uint8_t *indices) {
    __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(indices)));
    __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(index, 31), 31);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, index), _mm256_castsi256_ps(sign));
}

inline __m256 gather(const float *table, const uint8_t *indices) {
    __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(indices)));
    return _mm256_i32gather_ps(table, index, 4);
}

template <bool ADD, bool FEW, bool DIVIDE>
void accumulate_as(const uint8_t *indices, int n, const float *table, float *out, float divisor, Ahead &ahead) {
    __m256 few = _mm256_loadu_ps(table), by = _mm256_set1_ps(divisor);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        if (i % 128 == 0) ahead.lines(8);
        __m256 value = FEW ? look_up(few, indices + i) : gather(table, indices + i);
        __m256 before = ADD ? _mm256_loadu_ps(out + i) : _mm256_setzero_ps();
        __m256 sum = _mm256_add_ps(before, value);
        _mm256_storeu_ps(out + i, DIVIDE ? _mm256_div_ps(sum, by) : sum);
    }
    for (; i < n; i++) out[i] = ((ADD ? out[i] : 0.0f) + table[indices[i]]) / divisor;
}

void accumulate(const uint8_t *indices, int n, const float *table, int num_levels, float *out, bool add,
                float divisor, Ahead &ahead) {
    using Run = void (*)(const uint8_t *, int, const float *, float *, float, Ahead &);
    static const Run runs[2][2][2] = {
        {{accumulate_as<false, false, false>, accumulate_as<false, false, true>},
         {accumulate_as<false, true, false>, accumulate_as<false, true, true>}},
        {{accumulate_as<true, false, false>, accumulate_as<true, false, true>},
         {accumulate_as<true, true, false>, accumulate_as<true, true, true>}}};
    runs[add][num_levels < 8][divisor != 1.0f](indices, n, table, out, divisor, ahead);
}

/* ---- rounding ---------------------------------------------------------------------------------------------------- */

enum class Kind { UNIFORM, FEW, SOME, MANY };

/* What rounding needs of a bucket, in vectors. The product with 2^b = `unit` is exact, so that tables may hold it. */
struct Rounding {
    const Code &code;
    __m256 scale, top, unit; /* of UNIFORM: s 2^b / norm and s 2^b; of the others: 1 / norm and 1 */
    __m256 levels[2], gaps[2], halves[3];
    __m256i words[2];
};

inline __m256i random_bits(const Rounding &r, __m256i counter) {
    __m256i x = _mm256_add_epi32(counter, r.words[0]);
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(0x7FEB352D));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
    x = _mm256_add_epi32(x, r.words[1]);
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(int(0x846CA68Bu)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

template <Kind KIND>
inline __m256 pick(const __m256 *tables, const float *all, __m256i j) {
    if (KIND == Kind::MANY) return _mm256_i32gather_ps(all, j, 4);
    __m256 low = _mm256_permutevar8x32_ps(tables[0], j);
    if (KIND == Kind::FEW) return low;
    __m256 high = _mm256_permutevar8x32_ps(tables[1], j);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(j, 28)));
}

/* How many of l_1 ... l_(s-1) are not above u. For up to eight levels by halves: is it at least 4, then 2 more, then 1. */
template <Kind KIND>
inline __m256i level_below(const Rounding &r, __m256 u) {
    const Code &code = r.code;
    if (KIND == Kind::FEW) {
        __m256i four = _mm256_castps_si256(_mm256_cmp_ps(r.halves[0], u, _CMP_LE_OQ));
        __m256i j = _mm256_and_si256(four, _mm256_set1_epi32(4));
        __m256i two = _mm256_castps_si256(_mm256_cmp_ps(_mm256_permutevar8x32_ps(r.halves[1], j), u, _CMP_LE_OQ));
        j = _mm256_or_si256(j, _mm256_and_si256(two, _mm256_set1_epi32(2)));
        __m256i one = _mm256_castps_si256(_mm256_cmp_ps(_mm256_permutevar8x32_ps(r.halves[2], j), u, _CMP_LE_OQ));
        return _mm256_sub_epi32(j, one);
    }
    if (KIND == Kind::SOME) {
        __m256i j = _mm256_setzero_si256();
        for (int i = 1; i < code.num_levels; i++) {
            __m256 reached = _mm256_cmp_ps(_mm256_set1_ps(code.levels[i]), u, _CMP_LE_OQ);
            j = _mm256_sub_epi32(j, _mm256_castps_si256(reached));
        }
        return j;
    }
    __m256i slot = _mm256_srli_epi32(_mm256_castps_si256(u), SLOT_SHIFT);
    slot = _mm256_max_epi32(_mm256_sub_epi32(slot, _mm256_set1_epi32(FIRST_SLOT - 1)), _mm256_setzero_si256());
    __m256i j = _mm256_i32gather_epi32(reinterpret_cast<const int *>(code.start.data()), slot, 1);
    j = _mm256_and_si256(j, _mm256_set1_epi32(255));
    const __m256i last = _mm256_set1_epi32(code.num_levels - 1);
    for (;;) {
        __m256 next = _mm256_i32gather_ps(code.levels + 1, j, 4);
        __m256i reached = _mm256_castps_si256(_mm256_cmp_ps(next, u, _CMP_LE_OQ));
        reached = _mm256_and_si256(reached, _mm256_cmpgt_epi32(last, j));
        if (_mm256_testz_si256(reached, reached)) return j;
        j = _mm256_sub_epi32(j, reached);
    }
}

template <Kind KIND, int BITS>
inline __m256i symbols_of(const Rounding &r, const float *values, __m256i draw) {
    __m256 v = _mm256_loadu_ps(values);
    __m256 magnitude = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)));
    __m256 x = _mm256_min_ps(_mm256_mul_ps(magnitude, r.scale), r.top);
    __m256i j = _mm256_setzero_si256();
    if (KIND != Kind::UNIFORM) {
        j = level_below<KIND>(r, x);
        x = _mm256_sub_ps(x, pick<KIND>(r.levels, r.code.levels, j));
        x = _mm256_mul_ps(x, pick<KIND>(r.gaps, r.code.inverse_gaps, j));
        if (KIND == Kind::MANY) x = _mm256_mul_ps(x, r.unit);
    }
    __m256i index = _mm256_srli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), draw), BITS);
    index = _mm256_add_epi32(index, j);
    return _mm256_sign_epi32(index, _mm256_castps_si256(v));
}

/* 32 elements; `counter` counts their draws, a hash for every two. */
template <Kind KIND, int BITS>
inline void round_32(const Rounding &r, const float *values, __m256i counter, int8_t *symbols) {
    const __m256i low = _mm256_set1_epi32((1 << BITS) - 1), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i one = random_bits(r, counter), two = random_bits(r, _mm256_add_epi32(counter, _mm256_set1_epi32(8)));
    __m256i a = symbols_of<KIND, BITS>(r, values, _mm256_and_si256(_mm256_srli_epi32(one, 16 - BITS), low));
    __m256i b = symbols_of<KIND, BITS>(r, values + 8, _mm256_srli_epi32(one, 32 - BITS));
    __m256i c = symbols_of<KIND, BITS>(r, values + 16, _mm256_and_si256(_mm256_srli_epi32(two, 16 - BITS), low));
    __m256i d = symbols_of<KIND, BITS>(r, values + 24, _mm256_srli_epi32(two, 32 - BITS));
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    store(symbols, _mm256_permutevar8x32_epi32(packed, order));
}

template <Kind KIND, int BITS>
void round_all(const Rounding &r, const float *values, int n, int8_t *symbols) {
    __m256i counter = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        _mm_prefetch(reinterpret_cast<const char *>(values + i + n), _MM_HINT_T0); /* the next bucket's */
        _mm_prefetch(reinterpret_cast<const char *>(values + i + n + 16), _MM_HINT_T0);
        round_32<KIND, BITS>(r, values + i, counter, symbols + i);
        counter = _mm256_add_epi32(counter, _mm256_set1_epi32(16));
    }
    if (i == n) return;
    float rest[32] = {};
    memcpy(rest, values + i, size_t(n - i) * sizeof(float));
    round_32<KIND, BITS>(r, rest, counter, symbols + i);
}

void round_values(const Code &code, const float *values, int n, float norm, const Draws &draws, int8_t *symbols) {
    float unit = float(1 << code.draw_bits), top = float(code.num_levels) * unit;
    bool uniform = code.uniform;
    Rounding r{code,
               _mm256_set1_ps(uniform ? top / norm : 1.0f / norm),
               _mm256_set1_ps(uniform ? top : 1.0f),
               _mm256_set1_ps(unit),
               {_mm256_loadu_ps(code.levels), _mm256_loadu_ps(code.levels + 8)},
               {_mm256_loadu_ps(code.unit_gaps), _mm256_loadu_ps(code.unit_gaps + 8)},
               {_mm256_set1_ps(code.halves[0][0]), _mm256_loadu_ps(code.halves[1]), _mm256_loadu_ps(code.halves[2])},
               {_mm256_set1_epi32(int(draws.words[0] + uint32_t(draws.position))),
                _mm256_set1_epi32(int(draws.words[1] + uint32_t(draws.position >> 32) * 0x9E3779B9u))}};
    bool all_bits = code.draw_bits == 16;
    if (uniform && all_bits) return round_all<Kind::UNIFORM, 16>(r, values, n, symbols);
    if (uniform) return round_all<Kind::UNIFORM, 15>(r, values, n, symbols);
    if (code.num_levels <= 8 && code.wide_gaps) return round_all<Kind::FEW, 16>(r, values, n, symbols);
    if (code.num_levels <= 15 && code.wide_gaps) return round_all<Kind::SOME, 16>(r, values, n, symbols);
    all_bits ? round_all<Kind::MANY, 16>(r, values, n, symbols) : round_all<Kind::MANY, 15>(r, values, n, symbols);
}

#include "bucket.h"

/* ---- norms ------------------------------------------------------------------------------------------------------- */

/* A fused multiply-add rounds as an addition here, since a float32's square is exact in float64. */
inline void add_squares(const float *sixteen, __m256d *lanes) {
    for (int part = 0; part < 4; part++) {
        __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(sixteen + 4 * part));
        lanes[part] = _mm256_fmadd_pd(x, x, lanes[part]);
    }
}

float l2(const float *values, int n) {
    __m256d lanes[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
    int i = 0;
    for (; i + 16 <= n; i += 16) add_squares(values + i, lanes);
    if (i < n) {
        float rest[16] = {};
        memcpy(rest, values + i, size_t(n - i) * sizeof(float));
        add_squares(rest, lanes);
    }
    __m256d four = _mm256_add_pd(_mm256_add_pd(lanes[0], lanes[2]), _mm256_add_pd(lanes[1], lanes[3]));
    __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    double root = sqrt(_mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair)));
    float norm = float(root);
    return double(norm) < root ? nextafterf(norm, INFINITY) : norm;
}

float norm(uint32_t kind, const float *values, int n) {
    if (kind == QGENX_L2) return l2(values, n);
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

/* ---- checksum ---------------------------------------------------------------------------------------------------- */

uint32_t crc_serial(uint32_t crc, const uint8_t *data, uint64_t size) {
    uint64_t state = crc;
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        state = _mm_crc32_u64(state, word);
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
        uint64_t words[3];
        memcpy(words, data + i, 8);
        memcpy(words + 1, data + piece + i, 8);
        memcpy(words + 2, data + 2 * piece + i, 8);
        first = _mm_crc32_u64(first, words[0]);
        second = _mm_crc32_u64(second, words[1]);
        third = _mm_crc32_u64(third, words[2]);
    }
    uint32_t joined = crc_shift(crc_shift(uint32_t(first), piece) ^ uint32_t(second), piece) ^ uint32_t(third);
    return ~crc_serial(joined, data + 3 * piece, size - 3 * piece);
}

}  // namespace
}  // namespace avx2

const Kernels &avx2_kernels() {
    using namespace avx2;
    static const Kernels kernels{norm, round_bucket, encode_bucket, decode_bucket, histogram_bucket, moments_bucket, crc};
    return kernels;
}

}  // namespace qgenx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
