/* Runs of zeros, or of ones among what is not zero, between the elements that end them.
 * Included by avx2.cpp and portable.cpp, each into its namespace, after bits.inl and words.inl. Needs there: lowest
 * (number of the lowest set bit), above_mask, negative_mask, signs_of.
 */

/* Golomb-Rice: `gap` >> k zeros, a one, the k low bits. */
static inline void put_rice(Writer &writer, uint32_t gap, int k) {
    uint32_t quotient = gap >> k;
    for (; quotient >= 32; quotient -= 32) writer.put(0, 32);
    uint64_t low = gap & ((1u << k) - 1);
    writer.put((low << 1 | 1) << quotient, quotient + 1 + unsigned(k));
}

/* The run up to the bucket's end: as many zeros as no other run there could begin with. */
static inline void put_last_rice(Writer &writer, uint32_t left, int k) {
    uint32_t zeros = (left + (1u << k) - 1) >> k;
    for (; zeros >= 32; zeros -= 32) writer.put(0, 32);
    writer.put(0, zeros);
}

/* The smallest k for which 2^(k+1) times the runs are no fewer than what is in them: close to the best for random
 * places. */
static int rice_parameter(int inside, int runs) {
    int k = 0;
    while ((int64_t(runs) << (k + 1)) < inside) k++;
    return k;
}

static inline void put_omega(Writer &writer, uint32_t gap, const OmegaTables &omega) {
    const OmegaTables::Entry &word = omega.words[gap + 1];
    writer.put(word.bits, word.length);
}

static void write_gaps(Runs kind, const uint16_t *positions, int count, int n, Writer &to) {
    Writer writer = to; /* whose members no store can be thought to change */
    int k = rice_parameter(n - count, count + 1), next = 0;
    bool rice = kind == Runs::RICE;
    const OmegaTables &omega = omega_tables();
    if (rice) writer.put(uint64_t(k), 4);
    for (int i = 0; i < count; i++) {
        uint32_t gap = uint32_t(positions[i] - next);
        rice ? put_rice(writer, gap, k) : put_omega(writer, gap, omega);
        next = positions[i] + 1;
    }
    if (next < n) rice ? put_last_rice(writer, uint32_t(n - next), k) : put_omega(writer, uint32_t(n - next), omega);
    to = writer;
}

/* The symbols of a magnitude above `least`, close together in `dense`, and where they were; their number comes back.
 * `dense` may be `symbols`. */
static int gather_above(int least, const int8_t *symbols, int n, int8_t *dense, uint16_t *positions) {
    int count = 0;
    for (int m = 0; m < (n + 63) / 64; m++) {
        for (uint64_t mask = above_mask(symbols + 64 * m, least) & valid_mask(n, m); mask; mask &= mask - 1) {
            int position = 64 * m + lowest(mask);
            positions[count] = uint16_t(position);
            dense[count++] = symbols[position];
        }
    }
    return count;
}

/* Runs of ones among `count` symbols that are not zero, and the signs of the ones. Leaves the others. */
static int write_ones(int8_t *symbols, int count, Writer &writer, Scratch &scratch) {
    int masks = (count + 63) / 64;
    uint64_t *ones = scratch.planes.get(), *signs = ones + scratch.masks;
    for (int m = 0; m < masks; m++) {
        ones[m] = ~above_mask(symbols + 64 * m, 1) & valid_mask(count, m);
        signs[m] = negative_mask(symbols + 64 * m);
    }
    int rest = gather_above(1, symbols, count, symbols, scratch.positions.get());
    write_gaps(Runs::RICE, scratch.positions.get(), rest, count, writer);
    writer.put_at(signs, ones, masks);
    return rest;
}

static void write_runs(const Code &code, const int8_t *symbols, int n, Writer &writer, Scratch &scratch) {
    int8_t *dense = reinterpret_cast<int8_t *>(scratch.indices.get());
    int count = gather_above(0, symbols, n, dense, scratch.positions.get());
    write_gaps(code.runs, scratch.positions.get(), count, n, writer);
    memset(dense + count, 0, PAD);
    if (count && code.ones) count = write_ones(dense, count, writer, scratch);
    memset(dense + count, 0, PAD);
    if (count) write_words(code, dense, count, writer, scratch);
}

/* A gap of at most `left`, which stands for the run up to the end; ~0 if there is none or its bits pass the end. */
static inline uint32_t get_rice(Reader &reader, int k, uint32_t left) {
    uint32_t most = (left + (1u << k) - 1) >> k, zeros = 0;
    uint64_t window = reader.peek(reader.at);
    for (; window == 0 && zeros + 64 < most; window = reader.peek(reader.at)) {
        zeros += 64;
        reader.at += 64;
        if (reader.at > reader.end) return ~0u;
    }
    uint32_t more = window ? uint32_t(lowest(window)) : 64;
    if (zeros + more >= most) {
        reader.at += most - zeros;
        return left;
    }
    reader.at += more + 1;
    uint64_t low = (more + 1 + unsigned(k) <= 64 ? window >> 1 >> more : reader.peek(reader.at)) & ((1u << k) - 1);
    reader.at += unsigned(k);
    uint32_t gap = ((zeros + more) << k) + uint32_t(low);
    return gap < left ? gap : ~0u;
}

static inline uint32_t get_omega(Reader &reader, const OmegaTables &omega) {
    OmegaTables::Entry found = omega.windows[reader.peek(reader.at) & ((1u << OmegaTables::WINDOW) - 1)];
    if (found.length) {
        reader.at += found.length;
        return found.bits - 1;
    }
    uint32_t value = 1;
    for (;;) {
        uint64_t window = reader.peek(reader.at);
        if (!(window & 1)) break;
        if (value > 15) return ~0u; /* a group of so many bits and one more is longer than any bucket */
        uint32_t group = 0;
        for (uint32_t i = 0; i <= value; i++) group = group << 1 | uint32_t(window >> i & 1);
        reader.at += value + 1;
        value = group;
        if (value > QGENX_MAX_BUCKET + 1 || reader.at > reader.end) return ~0u;
    }
    reader.at += 1;
    return value - 1;
}

/* Those runs before `n` that lie in the next 64 bits as a whole; the last one, and what is wrong, is left to others. */
static void get_whole_gaps(Reader &reader, int k, uint32_t n, uint32_t &next, uint16_t *positions, int &count) {
    uint64_t window = reader.peek(reader.at);
    unsigned used = 0;
    while (window) {
        unsigned zeros = unsigned(lowest(window)), bits = zeros + 1 + unsigned(k);
        uint32_t gap = (zeros << k) + (uint32_t(window >> zeros >> 1) & ((1u << k) - 1));
        if (used + bits > 64 || gap >= n - next) break;
        positions[count++] = uint16_t(next + gap);
        next += gap + 1;
        window = window >> zeros >> 1 >> k;
        used += bits;
    }
    reader.at += used;
}

/* Fills the positions of the elements that end runs and sets their number. */
static const char *read_gaps(Runs kind, Reader &reader, int numel, uint16_t *positions, int &count, Ahead &ahead) {
    bool rice = kind == Runs::RICE;
    const OmegaTables &omega = omega_tables();
    int k = rice ? int(reader.get(4)) : 0;
    uint32_t n = uint32_t(numel), next = 0;
    count = 0;
    while (next < n) {
        int before = count;
        if (rice) get_whole_gaps(reader, k, n, next, positions, count);
        uint32_t left = n - next, gap = left;
        if (left) gap = rice ? get_rice(reader, k, left) : get_omega(reader, omega);
        ahead.lines(2 + 2 * (count - before));
        if (reader.at > reader.end || gap > left) return PAST_END;
        next += gap;
        if (next < n) positions[count++] = uint16_t(next);
        next++;
    }
    return rice && k != rice_parameter(numel - count, count + 1) ? "a Rice parameter that no encoder writes" : nullptr;
}

/* The way back from write_ones: `symbols` of the ones, and where the `rest` others are. */
static const char *read_ones(Reader &reader, int count, uint8_t *symbols, uint16_t *others, int &rest,
                             Scratch &scratch) {
    int masks = (count + 63) / 64;
    uint64_t *ones = scratch.planes.get(), *signs = ones + scratch.masks;
    if (const char *wrong = read_gaps(Runs::RICE, reader, count, others, rest, scratch.ahead)) return wrong;
    for (int m = 0; m < masks; m++) ones[m] = valid_mask(count, m);
    for (int i = 0; i < rest; i++) ones[others[i] / 64] &= ~(1ull << others[i] % 64);
    reader.get_at(signs, ones, masks);
    if (reader.at > reader.end) return PAST_END;
    signs_of(signs, masks, symbols);
    return nullptr;
}

/* The symbols of the elements that are not zero, `count` of them, and their positions. */
static const char *read_nonzeros(const Code &code, Reader &reader, int n, uint16_t *positions, int &count,
                                 uint8_t *symbols, Scratch &scratch) {
    if (const char *wrong = read_gaps(code.runs, reader, n, positions, count, scratch.ahead)) return wrong;
    if (!count) return nullptr;
    if (!code.ones) return read_words(code, reader, count, symbols, scratch);
    uint16_t *others = positions + count;
    uint8_t *dense = reinterpret_cast<uint8_t *>(scratch.symbols.get());
    int rest;
    if (const char *wrong = read_ones(reader, count, symbols, others, rest, scratch)) return wrong;
    if (rest)
        if (const char *wrong = read_words(code, reader, rest, dense, scratch)) return wrong;
    for (int i = 0; i < rest; i++) symbols[others[i]] = dense[i];
    return nullptr;
}

static const char *read_runs(const Code &code, Reader &reader, int n, const float *table, float *out, bool add,
                             const Finish &finish, Scratch &scratch) {
    uint16_t *positions = scratch.positions.get();
    uint8_t *symbols = scratch.indices.get();
    int count;
    if (const char *wrong = read_nonzeros(code, reader, n, positions, count, symbols, scratch)) return wrong;
    scratch.ahead.lines(n / 16); /* the rest of them */
    if (!add) memset(out, 0, size_t(n) * sizeof(float));
    for (int i = 0; i < count; i++) out[positions[i]] += table[symbols[i]];
    if (finish.is_needed())
        for (int i = 0; i < n; i++) out[i] = finish.of(out[i]);
    return nullptr;
}
