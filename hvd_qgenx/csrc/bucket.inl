/* A bucket's code, written once for both paths, and what is common to their rounding.
 * Included by avx2.cpp and portable.cpp, each into its namespace, after bits.inl, words.inl and runs.inl. Needs there:
 * pext, pdep, pack_nibbles, unpack_nibbles, codes_to_symbols, accumulate, round_values.
 */

static const char *const BEHIND = "a bucket with bits behind its code words";

/* ---- fixed width: eight symbols take `width` bytes ------------------------------------------------------------- */

static int write_fixed(const Code &code, const int8_t *symbols, int n, uint8_t *out) {
    if (code.width == 4) {
        pack_nibbles(symbols, n, code.num_levels, out);
        if (n & 1) out[n / 2] &= 15;
        return (n + 1) / 2;
    }
    uint64_t lanes = 0x0101010101010101ull, mask = lanes * ((1u << code.width) - 1);
    uint64_t offset = uint64_t(code.num_levels);
    int whole = n / 8, rest = n % 8;
    for (int group = 0; group <= whole; group++) {
        if (group == whole && rest == 0) break;
        uint64_t raw, sum;
        memcpy(&raw, symbols + 8 * group, 8);
        /* adds the offset to each byte without a carry between them */
        sum = ((raw & ~(lanes << 7)) + lanes * offset) ^ (raw & lanes << 7);
        if (group == whole) sum &= (1ull << 8 * rest) - 1;
        uint64_t packed = pext(sum, mask);
        memcpy(out + group * code.width, &packed, 8);
    }
    return (n * code.width + 7) / 8;
}

static const char *read_fixed(const Code &code, const uint8_t *bytes, int size, int n, uint8_t *symbols) {
    uint64_t lanes = 0x0101010101010101ull, mask = lanes * ((1u << code.width) - 1);
    if (n * code.width % 8 && bytes[size - 1] >> (n * code.width % 8)) return BEHIND;
    if (code.width == 4) unpack_nibbles(bytes, n, symbols);
    for (int group = 0; code.width != 4 && group < (n + 7) / 8; group++) {
        uint64_t packed;
        memcpy(&packed, bytes + group * code.width, 8);
        packed = pdep(packed, mask);
        memcpy(symbols + 8 * group, &packed, 8);
    }
    return codes_to_symbols(symbols, n, code.num_levels) ? nullptr : "a symbol above the highest level";
}

/* ---- counts ---------------------------------------------------------------------------------------------------- */

static void count_symbols(const int8_t *symbols, int n, int num_levels, uint64_t *counts) {
    uint32_t tables[4][256] = {}; /* neighbours are often equal: four counters do not wait for one another */
    for (int i = 0; i < n; i++) tables[i & 3][uint8_t(symbols[i])]++;
    for (int symbol = -num_levels; symbol <= num_levels; symbol++)
        for (auto &table : tables) counts[symbol < 0 ? -symbol : symbol] += table[uint8_t(symbol)];
}

/* ---- a bucket -------------------------------------------------------------------------------------------------- */

static int encode_bucket(const Code &code, const int8_t *symbols, int n, uint8_t *out, Scratch &scratch) {
    uint8_t *bytes = scratch.bytes.get();
    int size;
    if (code.width) {
        size = write_fixed(code, symbols, n, bytes);
    } else {
        Writer writer(bytes);
        code.runs == Runs::NONE ? write_words(code, symbols, n, writer, scratch)
                                : write_runs(code, symbols, n, writer, scratch);
        size = int(writer.end() - bytes);
    }
    memcpy(out, bytes, size_t(size));
    return size;
}

/* The values of symbols by their low byte, and of a few by their lowest four bits too. */
static void list_values(const Code &code, float norm, float *table) {
    memset(table, 0, 16 * sizeof(float));
    for (int index = 0; index <= code.num_levels; index++) {
        float value = code.levels[index] * norm;
        table[index] = value;
        if (index) table[256 - index] = -value;
        if (index && code.few) table[16 - index] = -value;
    }
}

static const char *decode_bucket(const Code &code, const uint8_t *bytes, int size, int n, float norm, float *out,
                                 bool add, const Finish &finish, Scratch &scratch) {
    float table[256];
    list_values(code, norm, table);
    uint8_t *copy = scratch.bytes.get(), *symbols = scratch.indices.get();
    memcpy(copy, bytes, size_t(size));
    memset(copy + size, 0, 16);
    const char *wrong;
    scratch.ahead = {reinterpret_cast<const char *>(out + n), reinterpret_cast<const char *>(out + 2 * n)};
    if (code.width) {
        wrong = read_fixed(code, copy, size, n, symbols);
    } else {
        Reader reader{copy, 0, 8 * uint64_t(size)};
        wrong = code.runs == Runs::NONE ? read_words(code, reader, n, symbols, scratch)
                                        : read_runs(code, reader, n, table, out, add, finish, scratch);
        if (!wrong && reader.end - reader.at >= 8) return "a bucket with bytes behind its code words";
        if (!wrong && reader.end != reader.at && copy[size - 1] >> (8 - (reader.end - reader.at))) return BEHIND;
    }
    if (wrong || code.runs != Runs::NONE) return wrong;
    accumulate(code, symbols, n, table, out, add, finish, scratch.ahead);
    return nullptr;
}

/* ---- norms that are small or large, and the tail of a bucket ------------------------------------------------------ */

/* Between what receivers will compute of the levels: where that is subnormal it may be far from l_j norm. All is
 * multiplied by 2^80, which changes no bit. */
static void round_small(const Code &code, const float *values, int n, float norm, const Draws &draws, int8_t *symbols) {
    float table[QGENX_MAX_LEVELS + 2];
    int s = code.num_levels;
    for (int j = 0; j <= s; j++) table[j] = code.levels[j] * norm * 0x1p80f;
    table[s + 1] = INFINITY;
    for (int i = 0; i < n; i++) {
        float magnitude = fabsf(values[i]) * 0x1p80f;
        int j = int(std::upper_bound(table, table + s + 1, magnitude) - table) - 1;
        float x = (magnitude - table[j]) * (1.0f / (table[j + 1] - table[j])) * 0x1p31f;
        int index = j + rounded(x, draws.of(i), 31);
        symbols[i] = int8_t(values[i] < 0.0f ? -index : index);
    }
}

static void round_bucket(const Code &code, const float *values, int n, float norm, const Draws &draws, int8_t *symbols,
                         Scratch &scratch) {
    memset(symbols + (n & ~63), 0, 64);
    if (norm < SMALL_NORM) return round_small(code, values, n, norm, draws, symbols);
    float scale = scale_of(norm);
    if (scale != 1.0f) {
        for (int i = 0; i < n; i++) scratch.scaled[size_t(i)] = values[i] * scale;
        values = scratch.scaled.get();
    }
    round_values(code, values, n, norm * scale, draws, symbols);
}

static const float *normalised(const float *values, int n, float norm, Scratch &scratch) {
    float scale = scale_of(norm), inverse = 1.0f / (norm * scale);
    for (int i = 0; i < n; i++) {
        float u = fabsf(values[i] * scale) * inverse;
        scratch.scaled[size_t(i)] = u < 1.0f ? u : 1.0f;
    }
    return scratch.scaled.get();
}

/* The bin of a magnitude, by its float32 bits: 32 to the octave from 2^-16 on, and one for all that is smaller. */
inline uint16_t bin_of(float magnitude) {
    constexpr int FIRST_BIN = (127 - 16) << 5;
    int32_t bits;
    memcpy(&bits, &magnitude, 4);
    int32_t bin = (bits >> 18) - FIRST_BIN + 1;
    return uint16_t(bin < 0 ? 0 : bin > QGENX_NUM_BINS - 1 ? QGENX_NUM_BINS - 1 : bin);
}

static void histogram_bucket(const float *values, int n, float norm, uint32_t weight, int64_t *weighted, int64_t *plain,
                             Scratch &scratch) {
    const float *magnitudes = normalised(values, n, norm, scratch);
    uint16_t counts[4][QGENX_NUM_BINS] = {}; /* neighbours often meet in one bin: four counters do not wait */
    uint16_t *bins = scratch.positions.get();
    for (int i = 0; i < n; i++) bins[i] = bin_of(magnitudes[i]);
    for (int i = 0; i < n; i++) counts[i & 3][bins[i]]++;
    for (int bin = 0; bin < QGENX_NUM_BINS; bin++) {
        uint32_t count = uint32_t(counts[0][bin]) + counts[1][bin] + counts[2][bin] + counts[3][bin];
        weighted[bin] += int64_t(uint64_t(weight) * count);
        plain[bin] += count;
    }
}

static void moments_bucket(const float *values, int n, float norm, uint32_t weight, int64_t *weighted, int64_t *plain,
                           Scratch &scratch) {
    const float *magnitudes = normalised(values, n, norm, scratch);
    int64_t sums[3] = {int64_t(n) << 16, 0, 0};
    for (int i = 0; i < n; i++) {
        int32_t r = int32_t(rintf(magnitudes[i] * 65536.0f)); /* at most 2^16, whose square has 33 bits */
        sums[1] += values[i] < 0.0f ? -r : r;
        sums[2] += int64_t(r) * r >> 16;
    }
    for (int power = 0; power < 3; power++) {
        weighted[power] += int64_t(weight) * sums[power] >> 16;
        plain[power] += sums[power];
    }
}
