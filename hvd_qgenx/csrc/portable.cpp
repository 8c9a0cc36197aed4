/* The portable path: plain C++17, the same bytes as every other. */
#include <cmath>

#include "kernels.h"

namespace qgenx {
namespace portable {
namespace {

inline unsigned popcount(uint64_t x) {
    x -= x >> 1 & 0x5555555555555555ull;
    x = (x & 0x3333333333333333ull) + (x >> 2 & 0x3333333333333333ull);
    return unsigned(((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0full) * 0x0101010101010101ull >> 56);
}

inline int lowest(uint64_t x) { return int(popcount((x & (0 - x)) - 1)); }

inline uint64_t pext(uint64_t x, uint64_t mask) {
    if (mask == ~0ull) return x;
    uint64_t packed = 0;
    for (uint64_t bit = 1; mask; mask &= mask - 1, bit <<= 1)
        if (x & mask & (0 - mask)) packed |= bit;
    return packed;
}

inline uint64_t pdep(uint64_t x, uint64_t mask) {
    if (mask == ~0ull) return x;
    uint64_t spread = 0;
    for (; mask; mask &= mask - 1, x >>= 1)
        if (x & 1) spread |= mask & (0 - mask);
    return spread;
}

/* Which of 64 symbols have a magnitude above `least`, which are negative. */
inline uint64_t above_mask(const int8_t *symbols, int least) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++) mask |= uint64_t(symbols[i] > least || symbols[i] < -least) << i;
    return mask;
}

inline uint64_t negative_mask(const int8_t *symbols) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i++) mask |= uint64_t(symbols[i] < 0) << i;
    return mask;
}

/* The bits of the code words of symbols, a mask for each depth and 64 symbols. */
void word_planes(const Code &code, const int8_t *symbols, int masks, int stride, uint64_t *planes) {
    for (int m = 0; m < masks; m++) {
        uint16_t found[64];
        for (int i = 0; i < 64; i++) found[i] = code.words[uint8_t(symbols[64 * m + i])];
        for (int depth = 0; depth < code.depth; depth++) {
            uint64_t ones = 0;
            for (int i = 0; i < 64; i++) ones |= uint64_t(found[i] >> (15 - depth) & 1) << i;
            planes[depth * stride + m] = ones;
        }
    }
}

/* Symbols from the bits of their code words. */
void symbols_of(const Code &code, const uint64_t *planes, int masks, int stride, uint8_t *symbols) {
    for (int m = 0; m < masks; m++)
        for (int i = 0; i < 64; i++) {
            unsigned word = 0;
            for (int depth = 0; depth < code.depth; depth++) word = word << 1 | (planes[depth * stride + m] >> i & 1);
            symbols[64 * m + i] = uint8_t(code.symbols[word]);
        }
}

/* -1 where a mask has a one, else 1. */
void signs_of(const uint64_t *negative, int masks, uint8_t *symbols) {
    for (int m = 0; m < masks; m++)
        for (int i = 0; i < 64; i++) symbols[64 * m + i] = negative[m] >> i & 1 ? 255 : 1;
}

/* In place, from symbol + s; false if one is above 2 s. */
bool codes_to_symbols(uint8_t *codes, int n, int num_levels) {
    bool good = true;
    for (int i = 0; i < n; i++) {
        good = good && codes[i] <= 2 * num_levels;
        codes[i] = uint8_t(codes[i] - num_levels);
    }
    return good;
}

/* Symbols of four bits, two a byte, the first lower. */
void pack_nibbles(const int8_t *symbols, int n, int num_levels, uint8_t *out) {
    for (int i = 0; i < n; i += 2) out[i / 2] = uint8_t((symbols[i] + num_levels) | (symbols[i + 1] + num_levels) << 4);
}

void unpack_nibbles(const uint8_t *bytes, int n, uint8_t *codes) {
    for (int i = 0; i < n; i++) codes[i] = uint8_t(bytes[i / 2] >> (i & 1 ? 4 : 0) & 15);
}

void accumulate(const Code &, const uint8_t *symbols, int n, const float *table, float *out, bool add,
                const Finish &finish, Ahead &) {
    for (int i = 0; i < n; i++) out[i] = finish.of((add ? out[i] : 0.0f) + table[symbols[i]]);
}

int level_below(const Code &code, float u) {
    int last = code.num_levels - 1, j = 0;
    if (code.search == Search::SLOTS) {
        uint32_t bits;
        memcpy(&bits, &u, 4);
        j = code.start[size_t(slot_of(bits))];
    }
    while (j < last && code.levels[j + 1] <= u) j++;
    return j;
}

void round_values(const Code &code, const float *values, int n, float norm, const Draws &draws, int8_t *symbols) {
    float unit = float(1u << code.draw_bits), top = float(code.num_levels) * unit;
    float uniform_scale = top / norm, inverse = 1.0f / norm;
    for (int i = 0; i < n; i++) {
        float magnitude = fabsf(values[i]), x;
        int j = 0;
        if (code.search == Search::UNIFORM) {
            x = magnitude * uniform_scale;
            x = x < top ? x : top;
        } else {
            float u = magnitude * inverse;
            u = u < 1.0f ? u : 1.0f;
            j = level_below(code, u);
            x = (u - code.levels[j]) * code.inverse_gaps[j] * unit;
        }
        int index = j + rounded(x, draws.of(i), code.draw_bits);
        symbols[i] = int8_t(values[i] < 0.0f ? -index : index);
    }
}

#include "bits.inl"
#include "words.inl"
#include "runs.inl"
#include "bucket.inl"

/* Lanes are folded in halves: docs/wire_format.md. */
double fold(double *lanes) {
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

double squares(const float *values, int n) {
    double lanes[16] = {};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int lane = 0; lane < 16; lane++) lanes[lane] += double(values[i + lane]) * double(values[i + lane]);
    for (int lane = 0; i + lane < n; lane++) lanes[lane] += double(values[i + lane]) * double(values[i + lane]);
    return fold(lanes);
}

double error_of(const Code &code, const int8_t *symbols, const float *values, int n, float norm) {
    float table[256];
    list_values(code, norm, table);
    double lanes[16] = {};
    for (int i = 0; i < n; i++) {
        float difference = table[uint8_t(symbols[i])] - values[i];
        lanes[i & 15] += double(difference) * double(difference);
    }
    return fold(lanes);
}

float largest(const float *values, int n) {
    uint32_t largest = 0; /* bits of a magnitude rise with it, and those of NaN are above those of infinity */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        bits &= 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    float found;
    memcpy(&found, &largest, 4);
    return found;
}

struct CrcTables {
    uint32_t of[8][256];
    CrcTables() {
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t crc = byte;
            for (int i = 0; i < 8; i++) crc = (crc >> 1) ^ ((crc & 1) ? CRC_POLYNOMIAL : 0);
            of[0][byte] = crc;
        }
        for (int table = 1; table < 8; table++)
            for (int byte = 0; byte < 256; byte++)
                of[table][byte] = (of[table - 1][byte] >> 8) ^ of[0][of[table - 1][byte] & 255];
    }
};

uint32_t crc(uint32_t crc, const uint8_t *data, uint64_t size) {
    static const CrcTables tables;
    crc = ~crc;
    for (; size >= 8; size -= 8, data += 8) {
        uint32_t next = 0;
        for (int i = 0; i < 8; i++) next ^= tables.of[7 - i][data[i] ^ (i < 4 ? crc >> 8 * i & 255 : 0)];
        crc = next;
    }
    for (; size; size--) crc = (crc >> 8) ^ tables.of[0][(crc ^ *data++) & 255];
    return ~crc;
}

}  // namespace
}  // namespace portable

const Kernels &portable_kernels() {
    using namespace portable;
    static const Kernels kernels{squares,       largest,       round_bucket,     count_symbols,  error_of,
                                 encode_bucket, decode_bucket, histogram_bucket, moments_bucket, crc};
    return kernels;
}

}  // namespace qgenx
