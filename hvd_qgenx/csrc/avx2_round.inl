/* Stochastic rounding of 32 elements at a time.
 * Included by avx2.cpp alone, into its namespace. Needs there: load, store.
 */

/* What rounding needs of a bucket, in vectors. The product with 2^b = `unit` is exact, so that tables may hold it. */
struct Rounding {
    const Code &code;
    __m256 scale, top, unit; /* of UNIFORM: s 2^b / norm and s 2^b; of the others: 1 / norm and 1 */
    __m256 levels[2], gaps[2];
    __m256i short_levels[6]; /* upper halves of l_1 and on, less one in the last place */
    __m256i key[2];
};

inline __m256i random_bits(const Rounding &r, __m256i counter) {
    __m256i x = _mm256_add_epi32(counter, r.key[0]);
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(0x7FEB352D));
    x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
    x = _mm256_add_epi32(x, r.key[1]);
    x = _mm256_mullo_epi32(x, _mm256_set1_epi32(int(0x846CA68Bu)));
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

template <Search SEARCH>
inline __m256 pick(const __m256 *tables, const float *all, __m256i j) {
    if (SEARCH == Search::SLOTS) return _mm256_i32gather_ps(all, j, 4);
    __m256 low = _mm256_permutevar8x32_ps(tables[0], j);
    if (SEARCH == Search::SHORT || SEARCH == Search::EIGHT) return low;
    __m256 high = _mm256_permutevar8x32_ps(tables[1], j);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(j, 28)));
}

struct Pair {
    __m256i a, b;
};

/* How many of l_1 ... l_(s-1) are not above u, if there are at most seven and the lower halves of their bits are zeros:
 * then the upper halves tell, and 16 are compared at once: each lane has one of a, and above it one of b. */
inline Pair few_below(const Rounding &r, __m256 a, __m256 b) {
    __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(a), 16), j = _mm256_setzero_si256();
    upper = _mm256_blend_epi16(upper, _mm256_castps_si256(b), 0xAA);
    for (const __m256i &level : r.short_levels) j = _mm256_sub_epi16(j, _mm256_cmpgt_epi16(upper, level));
    return {_mm256_and_si256(j, _mm256_set1_epi32(7)), _mm256_srli_epi32(j, 16)};
}

inline __m256i some_below(const Rounding &r, __m256 u) {
    __m256i j = _mm256_setzero_si256();
    for (int i = 1; i < r.code.num_levels; i++) {
        __m256 reached = _mm256_cmp_ps(_mm256_set1_ps(r.code.levels[i]), u, _CMP_LE_OQ);
        j = _mm256_sub_epi32(j, _mm256_castps_si256(reached));
    }
    return j;
}

inline __m256i many_below(const Rounding &r, __m256 u) {
    const Code &code = r.code;
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

template <Search SEARCH>
inline Pair levels_below(const Rounding &r, __m256 a, __m256 b) {
    if (SEARCH == Search::UNIFORM) return {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if (SEARCH == Search::SHORT) return few_below(r, a, b);
    if (SEARCH == Search::SLOTS) return {many_below(r, a), many_below(r, b)};
    return {some_below(r, a), some_below(r, b)};
}

inline __m256 scaled(const Rounding &r, const float *values) {
    __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi32(int(0x80000000u)));
    return _mm256_min_ps(_mm256_mul_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(values)), r.scale), r.top);
}

template <Search SEARCH, int BITS>
inline __m256i symbols_at(const Rounding &r, const float *values, __m256 x, __m256i j, __m256i draw) {
    if (SEARCH != Search::UNIFORM) {
        x = _mm256_sub_ps(x, pick<SEARCH>(r.levels, r.code.levels, j));
        x = _mm256_mul_ps(x, pick<SEARCH>(r.gaps, r.code.inverse_gaps, j));
        if (SEARCH == Search::SLOTS) x = _mm256_mul_ps(x, r.unit);
    }
    /* 2^31 has no place among the integers of cvtps, which then gives the very bits of it */
    __m256i index = _mm256_srli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), draw), BITS);
    index = _mm256_add_epi32(index, j);
    return _mm256_sign_epi32(index, load(values));
}

/* 16 elements; each hash has the draws of two, the first by its halves swapped. */
template <Search SEARCH, int BITS>
inline __m256i round_16(const Rounding &r, const float *values, __m256i hash) {
    const __m256i swap =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    __m256i swapped = _mm256_shuffle_epi8(hash, swap);
    __m256 a = scaled(r, values), b = scaled(r, values + 8);
    Pair j = levels_below<SEARCH>(r, a, b);
    return _mm256_packs_epi32(symbols_at<SEARCH, BITS>(r, values, a, j.a, _mm256_srli_epi32(swapped, 32 - BITS)),
                              symbols_at<SEARCH, BITS>(r, values + 8, b, j.b, _mm256_srli_epi32(hash, 32 - BITS)));
}

/* 32 elements; `counter` counts their draws. */
template <Search SEARCH, int BITS>
inline void round_32(const Rounding &r, const float *values, __m256i counter, int8_t *symbols) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i one = random_bits(r, counter), two = random_bits(r, _mm256_add_epi32(counter, _mm256_set1_epi32(8)));
    __m256i a = round_16<SEARCH, BITS>(r, values, one), b = round_16<SEARCH, BITS>(r, values + 16, two);
    store(symbols, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
}

template <Search SEARCH, int BITS>
void round_all(const Rounding &r, const float *values, int n, int8_t *symbols) {
    __m256i counter = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        _mm_prefetch(reinterpret_cast<const char *>(values + i + n), _MM_HINT_T0); /* the next bucket's */
        _mm_prefetch(reinterpret_cast<const char *>(values + i + n + 16), _MM_HINT_T0);
        round_32<SEARCH, BITS>(r, values + i, counter, symbols + i);
        counter = _mm256_add_epi32(counter, _mm256_set1_epi32(16));
    }
    if (i == n) return;
    float rest[32] = {};
    memcpy(rest, values + i, size_t(n - i) * sizeof(float));
    round_32<SEARCH, BITS>(r, rest, counter, symbols + i);
}

/* Evenly spaced levels leave as many bits to the draw as their number does not take. */
void round_uniform(const Rounding &r, const float *values, int n, int8_t *symbols) {
    constexpr Search UNIFORM = Search::UNIFORM;
    using Run = void (*)(const Rounding &, const float *, int, int8_t *);
    static const Run runs[] = {round_all<UNIFORM, 24>, round_all<UNIFORM, 25>, round_all<UNIFORM, 26>,
                               round_all<UNIFORM, 27>, round_all<UNIFORM, 28>, round_all<UNIFORM, 29>,
                               round_all<UNIFORM, 30>};
    runs[r.code.draw_bits - 24](r, values, n, symbols);
}

void round_values(const Code &code, const float *values, int n, float norm, const Draws &draws, int8_t *symbols) {
    float unit = float(1u << code.draw_bits), top = float(code.num_levels) * unit;
    bool uniform = code.search == Search::UNIFORM;
    Rounding r{code,
               _mm256_set1_ps(uniform ? top / norm : 1.0f / norm),
               _mm256_set1_ps(uniform ? top : 1.0f),
               _mm256_set1_ps(unit),
               {_mm256_loadu_ps(code.levels), _mm256_loadu_ps(code.levels + 8)},
               {_mm256_loadu_ps(code.unit_gaps), _mm256_loadu_ps(code.unit_gaps + 8)},
               {},
               {_mm256_set1_epi32(int(draws.key[0] + uint32_t(draws.position))),
                _mm256_set1_epi32(int(draws.key[1] + uint32_t(draws.position >> 32) * 0x9E3779B9u))}};
    for (int i = 0; i < 6; i++) r.short_levels[i] = _mm256_set1_epi16(code.short_levels[i]);
    switch (code.search) {
        case Search::UNIFORM:
            return round_uniform(r, values, n, symbols);
        case Search::SHORT:
            return round_all<Search::SHORT, 31>(r, values, n, symbols);
        case Search::EIGHT:
            return round_all<Search::EIGHT, 31>(r, values, n, symbols);
        case Search::SIXTEEN:
            return round_all<Search::SIXTEEN, 31>(r, values, n, symbols);
        case Search::SLOTS:
            return round_all<Search::SLOTS, 31>(r, values, n, symbols);
    }
}
