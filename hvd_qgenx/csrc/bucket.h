/* A bucket's code, written once for both paths. It is included into a path's namespace, which must have: pext, pdep,
 * popcount, lowest (number of the lowest set bit), nonzero_mask, word_planes, index_bytes, pack_nibbles, unpack_nibbles,
 * codes_to_indices, accumulate, round_values.
 */

/* Appends bits, lowest first. Writes up to 8 bytes past what it has been given. */
struct Writer {
    uint8_t *out;
    uint64_t pending = 0;
    unsigned fill = 0;

    explicit Writer(uint8_t *start) : out(start) {}

    inline void put(uint64_t bits, unsigned count) {
        pending |= bits << fill;
        memcpy(out, &pending, 8);
        uint64_t rest = bits >> 1 >> (63 - fill);
        unsigned total = fill + count;
        pending = total >= 64 ? rest : pending;
        out += total >> 6 << 3;
        fill = total & 63;
    }

    /* The bits of masks[w] at the ones of pass[w]. */
    inline void put_plane(const uint64_t *masks, const uint64_t *pass, int words) {
        for (int w = 0; w < words; w++) put(pext(masks[w], pass[w]), popcount(pass[w]));
    }

    /* The same, for masks so thin that the bits of GROUP words mostly fit one. */
    template <int GROUP>
    inline void put_thin_plane(const uint64_t *masks, const uint64_t *pass, int words) {
        int w = 0;
        for (; w + GROUP <= words; w += GROUP) {
            uint64_t bits = 0;
            unsigned count = 0;
            for (int k = 0; k < GROUP; k++) {
                bits |= pext(masks[w + k], pass[w + k]) << (count & 63);
                count += popcount(pass[w + k]);
            }
            count <= 64 ? put(bits, count) : put_plane(masks + w, pass + w, GROUP);
        }
        put_plane(masks + w, pass + w, words - w);
    }

    uint8_t *end() {
        memcpy(out, &pending, 8);
        return out + (fill + 7) / 8;
    }
};

/* Reads bits, lowest first, from a copy with slack behind it. `at` may pass `end`; whoever reads must compare. */
struct Reader {
    const uint8_t *data;
    uint64_t at, end;

    inline uint64_t peek(uint64_t position) const {
        uint64_t low;
        memcpy(&low, data + (position >> 3), 8);
        unsigned shift = position & 7;
        uint64_t high = data[(position >> 3) + 8];
        return low >> shift | high << 1 << (63 - shift);
    }
};

inline uint64_t valid_mask(int n, int word) { return n - 64 * word >= 64 ? ~0ull : (1ull << (n - 64 * word)) - 1; }

/* ---- the tree of words, as planes ----------------------------------------------------------------------------- */

/* The planes of all nodes, then the signs of those elements that have one (all, where zeros have no word). */
static void write_tree(const Code &code, const int8_t *symbols, int n, Writer &writer, Scratch &scratch) {
    int words = (n + 63) / 64, stride = scratch.words;
    uint64_t *planes = scratch.planes.get(), *signs = planes + 16 * stride, *nonzero = planes + 17 * stride;
    uint64_t *passing = scratch.passing.get();
    word_planes(code, symbols, words, stride, planes, signs, nonzero);
    for (int w = 0; w < words; w++) passing[w] = valid_mask(n, w);
    for (size_t number = 0; number < code.nodes.size(); number++) {
        const Node &node = code.nodes[number];
        const uint64_t *pass = passing + number * stride, *ones = planes + node.depth * stride;
        uint64_t *left = node.child[0] >= 0 ? passing + node.child[0] * stride : nullptr;
        uint64_t *right = node.child[1] >= 0 ? passing + node.child[1] * stride : nullptr;
        /* a word's first d bits are shared by about 2^-d of the elements */
        if (node.depth < 2)
            writer.put_plane(ones, pass, words);
        else if (node.depth == 2)
            writer.put_thin_plane<2>(ones, pass, words);
        else
            writer.put_thin_plane<4>(ones, pass, words);
        if (left) for (int w = 0; w < words; w++) left[w] = pass[w] & ~ones[w];
        if (right) for (int w = 0; w < words; w++) right[w] = pass[w] & ones[w];
    }
    writer.put_plane(signs, code.runs == Runs::NONE ? nonzero : passing, words);
}

static const char *const PAST_END = "a bucket whose code words pass its end";
static const char *const NO_WORD = "a code word that does not exist";
static const char *const BEHIND = "a bucket with bits behind its code words";

/* Puts the elements that end in a leaf where they belong; false if their branch leads nowhere. */
static inline bool settle(int child, const uint64_t *mask, int words, int stride, uint64_t *bits) {
    if (child >= 0) return true;
    if (child == Node::NONE) {
        uint64_t any = 0;
        for (int w = 0; w < words; w++) any |= mask[w];
        return any == 0;
    }
    int index = Node::LEAF - child;
    for (int bit = 0; index >> bit; bit++)
        if (index >> bit & 1)
            for (int w = 0; w < words; w++) bits[bit * stride + w] |= mask[w];
    return true;
}

/* The way back: fills `indices` with each element's index and its sign in bit 7. */
static const char *read_tree(const Code &code, Reader &reader, int n, uint8_t *indices, Scratch &scratch) {
    int words = (n + 63) / 64, stride = scratch.words;
    uint64_t *bits = scratch.planes.get(), *signs = bits + 7 * stride;
    uint64_t *leaf[2] = {bits + 8 * stride, bits + 9 * stride}, *passing = scratch.passing.get();
    for (int bit = 0; bit < code.index_bits; bit++) memset(bits + bit * stride, 0, size_t(words) * 8);
    for (int w = 0; w < words; w++) passing[w] = valid_mask(n, w);
    if (code.nodes.empty()) settle(Node::LEAF - 1, passing, words, stride, bits);
    for (size_t number = 0; number < code.nodes.size(); number++) {
        const Node &node = code.nodes[number];
        const uint64_t *pass = passing + number * stride;
        uint64_t *left = node.child[0] >= 0 ? passing + node.child[0] * stride : leaf[0];
        uint64_t *right = node.child[1] >= 0 ? passing + node.child[1] * stride : leaf[1];
        uint64_t at = reader.at;
        for (int w = 0; w < words; w++) {
            unsigned count = popcount(pass[w]);
            uint64_t ones = pdep(reader.peek(at), pass[w]);
            at += count;
            right[w] = ones;
            left[w] = pass[w] & ~ones;
        }
        reader.at = at;
        scratch.ahead.lines(words / 2);
        if (at > reader.end) return PAST_END;
        if (!settle(node.child[0], left, words, stride, bits)) return NO_WORD;
        if (!settle(node.child[1], right, words, stride, bits)) return NO_WORD;
    }
    for (int w = 0; w < words; w++) {
        uint64_t nonzero = 0;
        for (int bit = 0; bit < code.index_bits; bit++) nonzero |= bits[bit * stride + w];
        unsigned count = popcount(nonzero);
        signs[w] = pdep(reader.peek(reader.at), nonzero);
        reader.at += count;
    }
    if (reader.at > reader.end) return PAST_END;
    index_bytes(bits, code.index_bits, signs, words, stride, indices);
    return nullptr;
}

/* ---- runs of zeros -------------------------------------------------------------------------------------------- */

/* Golomb-Rice: `gap` >> k zeros, a one, the k low bits. */
static inline void put_rice(Writer &writer, uint32_t gap, int k) {
    uint32_t quotient = gap >> k;
    for (; quotient >= 32; quotient -= 32) writer.put(0, 32);
    uint64_t low = gap & ((1u << k) - 1);
    writer.put((low << 1 | 1) << quotient, quotient + 1 + unsigned(k));
}

/* The smallest k for which 2^(k+1) times the runs are no fewer than the zeros: close to the best for random places. */
static int rice_parameter(int zeros, int runs) {
    int k = 0;
    while ((int64_t(runs) << (k + 1)) < zeros) k++;
    return k;
}

static inline void put_omega(Writer &writer, uint32_t gap, const OmegaTables &omega) {
    const OmegaTables::Entry &word = omega.words[gap + 1];
    writer.put(word.bits, word.length);
}

/* The gaps before each non-zero element, and before the bucket's end unless an element ends it; then the others' tree. */
static void write_runs(const Code &code, const int8_t *symbols, int n, Writer &writer, Scratch &scratch) {
    int8_t *dense = reinterpret_cast<int8_t *>(scratch.indices.get());
    uint16_t *positions = scratch.positions.get();
    int count = 0;
    for (int w = 0; w < (n + 63) / 64; w++) {
        for (uint64_t mask = nonzero_mask(symbols + 64 * w); mask; mask &= mask - 1) {
            int position = 64 * w + lowest(mask);
            positions[count] = uint16_t(position);
            dense[count++] = symbols[position];
        }
    }
    int k = rice_parameter(n - count, count + 1), next = 0;
    bool rice = code.runs == Runs::RICE;
    const OmegaTables &omega = omega_tables();
    if (rice) writer.put(uint64_t(k), 4);
    for (int i = 0; i <= count; i++) {
        int position = i < count ? positions[i] : n;
        if (i == count && next == n) break;
        rice ? put_rice(writer, uint32_t(position - next), k) : put_omega(writer, uint32_t(position - next), omega);
        next = position + 1;
    }
    memset(dense + count, 0, PAD);
    if (count) write_tree(code, dense, count, writer, scratch);
}

/* A gap; one that is too long for a bucket, or whose bits pass the end, comes back longer than any bucket. */
static inline uint32_t get_rice(Reader &reader, int k) {
    uint32_t zeros = 0;
    uint64_t window = reader.peek(reader.at);
    while (window == 0) {
        zeros += 64;
        reader.at += 64;
        if (reader.at > reader.end || zeros > QGENX_MAX_BUCKET) return ~0u;
        window = reader.peek(reader.at);
    }
    unsigned last = unsigned(lowest(window));
    reader.at += last + 1;
    uint64_t low = (last + 1 + unsigned(k) <= 64 ? window >> 1 >> last : reader.peek(reader.at)) & ((1u << k) - 1);
    reader.at += unsigned(k);
    uint64_t gap = (uint64_t(zeros + last) << k) + low;
    return gap > QGENX_MAX_BUCKET ? ~0u : uint32_t(gap);
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

/* Fills the positions of the non-zero elements and sets their number. */
static const char *read_gaps(const Code &code, Reader &reader, int n, uint16_t *positions, int &count, Ahead &ahead) {
    bool rice = code.runs == Runs::RICE;
    const OmegaTables &omega = omega_tables();
    int k = 0;
    if (rice) {
        k = int(reader.peek(reader.at) & 15);
        reader.at += 4;
    }
    count = 0;
    for (uint32_t next = 0; next < uint32_t(n);) {
        uint32_t gap = rice ? get_rice(reader, k) : get_omega(reader, omega);
        ahead.lines(2);
        if (reader.at > reader.end || gap > uint32_t(n) - next) return PAST_END;
        next += gap;
        if (next < uint32_t(n)) positions[count++] = uint16_t(next);
        next++;
    }
    return rice && k != rice_parameter(n - count, count + 1) ? "a Rice parameter that no encoder writes" : nullptr;
}

static const char *read_runs(const Code &code, Reader &reader, int n, const float *table, float *out, bool add,
                             float divisor, Scratch &scratch) {
    uint16_t *positions = scratch.positions.get();
    uint8_t *indices = scratch.indices.get();
    int count;
    if (const char *wrong = read_gaps(code, reader, n, positions, count, scratch.ahead)) return wrong;
    if (count)
        if (const char *wrong = read_tree(code, reader, count, indices, scratch)) return wrong;
    bool all = table[0] != table[0]; /* a NaN norm: zeros are NaN too */
    if (!add) memset(out, 0, size_t(n) * sizeof(float));
    if (all)
        for (int i = 0; i < n; i++) out[i] = table[0];
    else
        for (int i = 0; i < count; i++) out[positions[i]] += table[indices[i]];
    if (divisor != 1.0f)
        for (int i = 0; i < n; i++) out[i] /= divisor;
    return nullptr;
}

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

static const char *read_fixed(const Code &code, const uint8_t *bytes, int size, int n, uint8_t *indices) {
    uint64_t lanes = 0x0101010101010101ull, mask = lanes * ((1u << code.width) - 1);
    if (n * code.width % 8 && bytes[size - 1] >> (n * code.width % 8)) return BEHIND;
    if (code.width == 4) unpack_nibbles(bytes, n, indices);
    for (int group = 0; code.width != 4 && group < (n + 7) / 8; group++) {
        uint64_t packed;
        memcpy(&packed, bytes + group * code.width, 8);
        packed = pdep(packed, mask);
        memcpy(indices + 8 * group, &packed, 8);
    }
    return codes_to_indices(indices, n, code.num_levels) ? nullptr : "a symbol above the highest level";
}

/* ---- a bucket -------------------------------------------------------------------------------------------------- */

static int encode_bucket(const Code &code, const int8_t *symbols, int n, uint8_t *out, Scratch &scratch) {
    uint8_t *bytes = scratch.bytes.get();
    int size;
    if (code.width) {
        size = write_fixed(code, symbols, n, bytes);
    } else {
        Writer writer(bytes);
        code.runs == Runs::NONE ? write_tree(code, symbols, n, writer, scratch)
                                : write_runs(code, symbols, n, writer, scratch);
        size = int(writer.end() - bytes);
    }
    memcpy(out, bytes, size_t(size));
    return size;
}

static const char *decode_bucket(const Code &code, const uint8_t *bytes, int size, int n, float norm, float *out,
                                 bool add, float divisor, Scratch &scratch) {
    float table[256];
    for (int index = 0; index <= code.num_levels; index++) {
        table[index] = code.levels[index] * norm;
        table[128 + index] = -table[index];
    }
    uint8_t *copy = scratch.bytes.get(), *indices = scratch.indices.get();
    memcpy(copy, bytes, size_t(size));
    memset(copy + size, 0, 16);
    const char *wrong;
    scratch.ahead = {reinterpret_cast<const char *>(out + n), reinterpret_cast<const char *>(out + 2 * n)};
    if (code.width) {
        wrong = read_fixed(code, copy, size, n, indices);
    } else {
        Reader reader{copy, 0, 8 * uint64_t(size)};
        wrong = code.runs == Runs::NONE ? read_tree(code, reader, n, indices, scratch)
                                        : read_runs(code, reader, n, table, out, add, divisor, scratch);
        if (!wrong && reader.end - reader.at >= 8) return "a bucket with bytes behind its code words";
        if (!wrong && reader.end != reader.at && copy[size - 1] >> (8 - (reader.end - reader.at))) return BEHIND;
    }
    if (wrong || code.runs != Runs::NONE) return wrong;
    accumulate(indices, n, table, code.num_levels, out, add, divisor, scratch.ahead);
    return nullptr;
}

/* ---- norms that need scaling, and the tail of a bucket ----------------------------------------------------------- */

static void round_bucket(const Code &code, const float *values, int n, float norm, const Draws &draws,
                         int8_t *symbols, Scratch &scratch) {
    memset(symbols + (n & ~63), 0, 64);
    if (norm == 0.0f) {
        memset(symbols, 0, size_t(n));
        return;
    }
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

static void histogram_bucket(const float *values, int n, float norm, int64_t *bins, Scratch &scratch) {
    constexpr int FIRST_BIN = (127 - 16) << 5;
    const float *magnitudes = normalised(values, n, norm, scratch);
    uint32_t counts[2][QGENX_NUM_BINS] = {}; /* neighbours often meet in one bin: two counters do not wait for each other */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, magnitudes + i, 4);
        int bin = int(bits >> 18) - FIRST_BIN + 1;
        bin = bin < 0 ? 0 : bin > QGENX_NUM_BINS - 1 ? QGENX_NUM_BINS - 1 : bin;
        counts[i & 1][bin]++;
    }
    for (int bin = 0; bin < QGENX_NUM_BINS; bin++) bins[bin] = int64_t(counts[0][bin]) + counts[1][bin];
}

static void moments_bucket(const float *values, int n, float norm, int64_t *sums, Scratch &scratch) {
    const float *magnitudes = normalised(values, n, norm, scratch);
    int64_t first = 0, second = 0;
    for (int i = 0; i < n; i++) {
        int64_t r = lrintf(magnitudes[i] * 65536.0f);
        first += values[i] < 0.0f ? -r : r;
        second += r * r >> 16;
    }
    sums[0] = int64_t(n) << 16;
    sums[1] = first;
    sums[2] = second;
}
