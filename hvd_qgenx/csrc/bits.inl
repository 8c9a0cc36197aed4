/* Bits one after another, lowest first.
 * Included by avx2.cpp and portable.cpp, each into its namespace. Needs there: pext, pdep, popcount.
 */

/* Appends bits. Writes up to 8 bytes past what it has been given. */
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

    /* The first n bits of a mask. */
    inline void put_first(const uint64_t *mask, int n) {
        Writer writer = *this; /* whose members no store can be thought to change */
        int m = 0;
        if (fill == 0) {
            m = n / 64;
            memcpy(out, mask, 8 * size_t(m));
            writer.out += 8 * m;
        }
        for (; m < n / 64; m++, writer.out += 8) {
            writer.pending |= mask[m] << fill;
            memcpy(writer.out, &writer.pending, 8);
            writer.pending = mask[m] >> 1 >> (63 - fill);
        }
        if (n % 64) writer.put(mask[n / 64] & ((1ull << n % 64) - 1), unsigned(n % 64));
        *this = writer;
    }

    /* The bits of `mask` at the ones of `pass`. */
    inline void put_at(const uint64_t *mask, const uint64_t *pass, int masks) {
        Writer writer = *this;
        for (int m = 0; m < masks; m++) writer.put(pext(mask[m], pass[m]), popcount(pass[m]));
        *this = writer;
    }

    /* The same, for so few ones that those of four masks mostly fit one. */
    inline void put_at_few(const uint64_t *mask, const uint64_t *pass, int masks) {
        Writer writer = *this;
        int m = 0;
        for (; m + 4 <= masks; m += 4) {
            uint64_t bits = 0;
            unsigned count = 0;
            for (int k = 0; k < 4; k++) {
                bits |= pext(mask[m + k], pass[m + k]) << (count & 63);
                count += popcount(pass[m + k]);
            }
            if (count > 64)
                for (int k = 0; k < 4; k++) writer.put(pext(mask[m + k], pass[m + k]), popcount(pass[m + k]));
            else
                writer.put(bits, count);
        }
        for (; m < masks; m++) writer.put(pext(mask[m], pass[m]), popcount(pass[m]));
        *this = writer;
    }

    uint8_t *end() {
        memcpy(out, &pending, 8);
        return out + (fill + 7) / 8;
    }
};

/* Reads bits from a copy with slack behind it. `at` may pass `end`; whoever reads must compare. */
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

    inline uint64_t get(unsigned count) { /* at most 63 */
        uint64_t bits = peek(at) & ((1ull << count) - 1);
        at += count;
        return bits;
    }

    /* The next n bits as a mask, zeros behind. */
    inline void get_first(uint64_t *mask, int n) {
        Reader reader = *this; /* whose members no store can be thought to change */
        int m = 0;
        if (at % 8 == 0) {
            m = n / 64;
            memcpy(mask, data + at / 8, 8 * size_t(m));
            reader.at += 64 * uint64_t(m);
        }
        for (; m < n / 64; m++, reader.at += 64) mask[m] = reader.peek(reader.at);
        if (n % 64) mask[n / 64] = reader.get(unsigned(n % 64));
        at = reader.at;
    }

    /* A bit for each one of `pass`. */
    inline void get_at(uint64_t *mask, const uint64_t *pass, int masks) {
        Reader reader = *this;
        for (int m = 0; m < masks; m++) {
            mask[m] = pdep(reader.peek(reader.at), pass[m]);
            reader.at += popcount(pass[m]);
        }
        at = reader.at;
    }

    inline void get_at_few(uint64_t *mask, const uint64_t *pass, int masks) {
        Reader reader = *this;
        int m = 0;
        for (; m + 4 <= masks; m += 4) {
            uint64_t bits = reader.peek(reader.at);
            unsigned count = 0;
            for (int k = 0; k < 4; k++) {
                mask[m + k] = pdep(bits >> (count & 63), pass[m + k]);
                count += popcount(pass[m + k]);
            }
            if (count > 64) {
                at = reader.at;
                get_at(mask + m, pass + m, 4);
                reader.at = at;
            } else {
                reader.at += count;
            }
        }
        at = reader.at;
        get_at(mask + m, pass + m, masks - m);
    }
};
