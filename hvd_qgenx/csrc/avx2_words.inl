/* Symbols to the bits of their code words, as masks for each depth, and back.
 * Included by avx2.cpp alone, into its namespace. Needs there: load, store, twice, top_bits.
 */

/* The bits of `places` change places with those SHIFT above them. */
template <int SHIFT>
inline __m256i swap_bits(__m256i x, int64_t places) {
    __m256i change = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, SHIFT)), _mm256_set1_epi64x(places));
    return _mm256_xor_si256(_mm256_xor_si256(x, change), _mm256_slli_epi64(change, SHIFT));
}

/* In each eight bytes: bit i of byte j becomes bit j of byte i. Source: Warren, Hacker's Delight, 7-3. */
inline __m256i transpose_bits(__m256i x) {
    x = swap_bits<7>(x, 0x00AA00AA00AA00AA);
    x = swap_bits<14>(x, 0x0000CCCC0000CCCC);
    return swap_bits<28>(x, 0x00000000F0F0F0F0);
}

/* Four rows of four 64-bit numbers become columns. */
inline void transpose_masks(__m256i *row) {
    __m256i a = _mm256_unpacklo_epi64(row[0], row[1]), b = _mm256_unpackhi_epi64(row[0], row[1]);
    __m256i c = _mm256_unpacklo_epi64(row[2], row[3]), d = _mm256_unpackhi_epi64(row[2], row[3]);
    row[0] = _mm256_permute2x128_si256(a, c, 0x20);
    row[1] = _mm256_permute2x128_si256(b, d, 0x20);
    row[2] = _mm256_permute2x128_si256(a, c, 0x31);
    row[3] = _mm256_permute2x128_si256(b, d, 0x31);
}

inline __m256i interleave(__m256i x) { /* in both halves, the first eight bytes with the others */
    const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(order));
}

/* The bits of 64 bytes, the highest first, four masks in each vector. */
inline void bits_of_bytes(__m256i low, __m256i high, __m256i *first, __m256i *second) {
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    low = _mm256_permutevar8x32_epi32(transpose_bits(low), even); /* by fours: masks 0 to 3, then 4 to 7 */
    high = _mm256_permutevar8x32_epi32(transpose_bits(high), even);
    const __m256i by_mask =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12));
    low = _mm256_shuffle_epi8(low, by_mask);
    high = _mm256_shuffle_epi8(high, by_mask);
    __m256i a = _mm256_unpacklo_epi32(low, high), b = _mm256_unpackhi_epi32(low, high);
    *second = _mm256_permute2x128_si256(a, b, 0x20);
    *first = _mm256_permute2x128_si256(a, b, 0x31);
}

/* The way back. */
inline void bytes_of_bits(__m256i first, __m256i second, __m256i *low, __m256i *high) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    first = interleave(_mm256_permute4x64_epi64(first, 0x1B));
    second = interleave(_mm256_permute4x64_epi64(second, 0x1B)); /* the lowest bit first */
    __m256i a = _mm256_permute2x128_si256(second, first, 0x20), b = _mm256_permute2x128_si256(second, first, 0x31);
    *low = transpose_bits(_mm256_permutevar8x32_epi32(_mm256_unpacklo_epi16(a, b), order));
    *high = transpose_bits(_mm256_permutevar8x32_epi32(_mm256_unpackhi_epi16(a, b), order));
}

/* So few bits are faster one by one. */
constexpr int FEW_BITS = 4;

inline void put_few_planes(const __m256i *bytes, int count, int stride, uint64_t *planes) {
    for (int m = 0; m < 4; m++) {
        __m256i low = bytes[2 * m], high = bytes[2 * m + 1];
        for (int bit = 0; bit < count; bit++) {
            planes[bit * stride + m] = top_bits(low, high);
            low = _mm256_add_epi8(low, low);
            high = _mm256_add_epi8(high, high);
        }
    }
}

/* Bytes of all ones where the mask of 32 elements has a one. */
inline __m256i spread_mask(const void *mask) {
    const __m256i source = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                                            3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
    uint32_t bits;
    memcpy(&bits, mask, 4);
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), source);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}

inline void get_few_planes(const uint64_t *planes, int count, int stride, __m256i *bytes) {
    for (int half = 0; half < 8; half++) bytes[half] = _mm256_setzero_si256();
    for (int bit = 0; bit < count; bit++) {
        const uint8_t *mask = reinterpret_cast<const uint8_t *>(planes + bit * stride);
        __m256i one = _mm256_set1_epi8(char(128 >> bit));
        for (int half = 0; half < 8; half++)
            bytes[half] = _mm256_or_si256(bytes[half], _mm256_and_si256(spread_mask(mask + 4 * half), one));
    }
}

/* The bits of bytes as masks, the highest first, of which `count` are wanted; 256 bytes at a time. */
inline void put_planes(const __m256i *bytes, int count, int stride, uint64_t *planes) {
    if (count <= FEW_BITS) return put_few_planes(bytes, count, stride, planes);
    __m256i mask[8];
    for (int m = 0; m < 4; m++) bits_of_bytes(bytes[2 * m], bytes[2 * m + 1], mask + m, mask + 4 + m);
    transpose_masks(mask);
    transpose_masks(mask + 4);
    for (int bit = 0; bit < count; bit++) store(planes + bit * stride, mask[bit]);
}

inline void get_planes(const uint64_t *planes, int count, int stride, __m256i *bytes) {
    if (count <= FEW_BITS) return get_few_planes(planes, count, stride, bytes);
    __m256i mask[8];
    for (int bit = 0; bit < 8; bit++) mask[bit] = bit < count ? load(planes + bit * stride) : _mm256_setzero_si256();
    transpose_masks(mask);
    transpose_masks(mask + 4);
    for (int m = 0; m < 4; m++) bytes_of_bits(mask[m], mask[4 + m], bytes + 2 * m, bytes + 2 * m + 1);
}

/* The bytes of 256 words. */
struct WordBytes {
    __m256i first[8], second[8];

    void of_few(const Code &code, const int8_t *symbols) {
        __m256i one = twice(code.few_words[0]), two = twice(code.few_words[1]), nibble = _mm256_set1_epi8(15);
        for (int i = 0; i < 8; i++) {
            __m256i index = _mm256_and_si256(load(symbols + 32 * i), nibble);
            first[i] = _mm256_shuffle_epi8(one, index);
            second[i] = _mm256_shuffle_epi8(two, index);
        }
    }

    void of_many(const Code &code, const int8_t *symbols) {
        const __m256i low = _mm256_set1_epi16(255);
        for (int i = 0; i < 8; i++) {
            alignas(32) uint16_t word[32];
            for (int k = 0; k < 32; k++) word[k] = code.words[uint8_t(symbols[32 * i + k])];
            __m256i a = load(word), b = load(word + 16);
            first[i] = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
            second[i] = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
            first[i] = _mm256_permute4x64_epi64(first[i], 0xD8);
            second[i] = _mm256_permute4x64_epi64(second[i], 0xD8);
        }
    }
};

void word_planes(const Code &code, const int8_t *symbols, int masks, int stride, uint64_t *planes) {
    WordBytes bytes;
    int first = code.depth < 8 ? code.depth : 8, second = code.depth - first;
    for (int m = 0; m < masks; m += 4) {
        code.few ? bytes.of_few(code, symbols + 64 * m) : bytes.of_many(code, symbols + 64 * m);
        put_planes(bytes.first, first, stride, planes + m);
        if (second) put_planes(bytes.second, second, stride, planes + 8 * stride + m);
    }
}

/* The symbols of words that are at most a byte long, by halves of it. */
inline __m256i few_symbols(const Code &code, __m256i bytes) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), second = _mm256_and_si256(bytes, nibble);
    __m256i found = _mm256_shuffle_epi8(twice(code.short_symbols), first);
    for (const Code::Longer &longer : code.longer)
        found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(twice(longer.symbols), second),
                                   _mm256_cmpeq_epi8(first, _mm256_set1_epi8(char(longer.first))));
    return found;
}

void symbols_of(const Code &code, const uint64_t *planes, int masks, int stride, uint8_t *symbols) {
    int first = code.depth < 8 ? code.depth : 8, second = code.depth - first;
    bool few = code.few && !second;
    for (int m = 0; m < masks; m += 4, symbols += 256) {
        __m256i bytes[8], more[8];
        get_planes(planes + m, first, stride, bytes);
        if (few) {
            for (int i = 0; i < 8; i++) store(symbols + 32 * i, few_symbols(code, bytes[i]));
            continue;
        }
        alignas(32) uint8_t high[256], low[256] = {};
        if (second) get_planes(planes + 8 * stride + m, second, stride, more);
        for (int i = 0; i < 8; i++) store(high + 32 * i, bytes[i]);
        for (int i = 0; i < 8 && second; i++) store(low + 32 * i, more[i]);
        int drop = 16 - code.depth;
        for (int i = 0; i < 256; i++) symbols[i] = uint8_t(code.symbols[(unsigned(high[i]) << 8 | low[i]) >> drop]);
    }
}

/* -1 where a mask has a one, else 1. */
void signs_of(const uint64_t *negative, int masks, uint8_t *symbols) {
    for (int half = 0; half < 2 * masks; half++)
        store(symbols + 32 * half, _mm256_or_si256(spread_mask(reinterpret_cast<const uint8_t *>(negative) + 4 * half),
                                                   _mm256_set1_epi8(1)));
}
