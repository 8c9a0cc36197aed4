/* What the programs here feed to the core: codebooks, jobs, right checksums. */
#ifndef FUZZ_INPUTS_H
#define FUZZ_INPUTS_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "payload.h"
#include "qgenx.h"

#define REQUIRE(condition)                                                                \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            abort();                                                                      \
        }                                                                                 \
    } while (0)

using Bytes = std::vector<uint8_t>;

using qgenx::At;
using qgenx::CHECKSUM;

/* Where the header's fields begin, and their bytes. */
struct Field {
    size_t offset, size;
};
constexpr Field FIELDS[] = {{At::MAGIC, 4},   {At::VERSION, 2},      {At::FLAGS, 1},     {At::NORM, 1},
                            {At::CODER, 1},   {At::NUM_LEVELS, 1},   {At::RESERVED, 2},  {At::SIZE, 8},
                            {At::NUMEL, 8},   {At::NUM_SEGMENTS, 4}, {At::MIN_NUMEL, 4}, {At::BUCKET_SIZE, 4},
                            {At::SEED, 8},    {At::STEP, 8},         {At::RANK, 4},      {At::STREAM, 4},
                            {At::CODEBOOK, 8}};

template <class T>
inline T get(const uint8_t *at) {
    T value;
    memcpy(&value, at, sizeof(T));
    return value;
}

template <class T>
inline void put(uint8_t *at, T value) {
    memcpy(at, &value, sizeof(T));
}

/* Makes size and checksum right, so that the rest is looked at. */
inline void sign(Bytes &payload) {
    if (payload.size() < At::END + CHECKSUM) return;
    put(payload.data() + At::SIZE, uint64_t(payload.size()));
    size_t content = payload.size() - CHECKSUM;
    put(payload.data() + content, qgenx::portable_kernels().crc(0, payload.data(), content));
}

enum class Table { UNIFORM, EXPONENTIAL, CROWDED, TINY, COUNT };
enum class Words { FLAT, SKEWED, RUNS, ONES };

inline uint32_t bits_of(uint32_t n) { return n ? 1 + bits_of(n / 2) : 0; }

/* Bits of Elias' word of n. */
inline uint32_t elias_length(uint32_t coder, uint32_t n) {
    uint32_t bits = bits_of(n);
    if (coder == QGENX_ELIAS_GAMMA) return 2 * bits - 1;
    if (coder == QGENX_ELIAS_DELTA) return 2 * bits_of(bits) - 1 + bits - 1;
    return n == 1 ? 1 : elias_length(coder, bits - 1) + bits;
}

/* Bits of the code word of a symbol of -s ... s. */
inline uint32_t word_length(uint32_t coder, uint32_t s, Words words, int symbol) {
    uint32_t magnitude = uint32_t(symbol < 0 ? -symbol : symbol), place = uint32_t(symbol + int(s));
    if (coder == QGENX_FIXED) return 0;
    if (coder == QGENX_ELIAS_RUNS) return magnitude ? elias_length(coder, magnitude) + 1 : 0;
    if (coder != QGENX_HUFFMAN) return elias_length(coder, magnitude + 1) + (magnitude ? 1 : 0);
    bool runs = words == Words::RUNS || words == Words::ONES;
    if (runs && magnitude == 0) return 0;
    if (words == Words::ONES && s > 1 && magnitude == 1) return 1;
    if (words != Words::SKEWED) return bits_of(2 * s);
    uint32_t last = s > 3 ? 14 : 2 * s; /* words of 1 to 6 bits, then of 14, as many as there are */
    return s > 3 ? (place < 6 ? place + 1 : last) : place < last ? place + 1 : last;
}

/* A codebook of `num_levels`, 1 to 127; `words` are the lengths of Huffman's code words. */
inline qgenx_codebook make_book(uint32_t coder, uint32_t num_levels, Table table, Words words, uint64_t hash = 0) {
    qgenx_codebook book = {};
    book.coder = coder;
    book.num_levels = num_levels;
    book.hash = hash;
    for (uint32_t j = 0; j <= num_levels; j++) {
        double place = double(j) / num_levels;
        book.levels[j] = float(table == Table::UNIFORM                          ? place
                               : table == Table::CROWDED && j && j < num_levels ? 0.5 + place / 4096
                               : table == Table::CROWDED                        ? place
                               : table == Table::TINY                           ? (j < num_levels ? j * 0x1p-126 : 1.0)
                               : j                                              ? std::pow(0.8, num_levels - j)
                                                                                : 0.0);
    }
    for (uint32_t i = 0; i <= 2 * num_levels; i++)
        book.lengths[i] = uint8_t(word_length(coder, num_levels, words, int(i) - int(num_levels)));
    return book;
}

/* How a vector is cut and encoded. */
struct Job {
    std::vector<uint64_t> sizes;
    qgenx_layout layout;
    qgenx_encoding encoding;

    Job(const std::vector<uint64_t> &segments, uint32_t bucket_size, uint32_t norm, uint32_t min_numel,
        bool with_codebook)
        : sizes(segments), layout(), encoding() {
        layout = {sizes.data(), uint32_t(sizes.size()), min_numel, bucket_size};
        encoding.norm = norm;
        encoding.key[0] = 0x12345678u;
        encoding.key[1] = 0x9abcdef0u;
        encoding.inline_codebook = with_codebook;
    }
    Job(const Job &) = delete; /* the layout points to these sizes */

    uint64_t buckets() const {
        uint64_t count = 0;
        for (uint64_t size : sizes)
            if (size >= layout.min_numel) count += (size + layout.bucket_size - 1) / layout.bucket_size;
        return count;
    }
};

/* Segments, each in memory of its own, to the byte. */
struct Segments {
    std::vector<std::vector<float>> values;
    std::vector<float *> pointers;

    /* All are copies of `value`. */
    Segments(const std::vector<uint64_t> &sizes, float value) {
        for (uint64_t size : sizes) values.emplace_back(size, value);
        for (std::vector<float> &segment : values) pointers.push_back(segment.data());
    }

    /* A vector, cut. */
    Segments(const std::vector<uint64_t> &sizes, const std::vector<float> &vector) : Segments(sizes, 0.0f) {
        auto at = vector.begin();
        for (std::vector<float> &segment : values)
            for (float &value : segment) value = *at++;
    }

    std::vector<float> joined() const {
        std::vector<float> all;
        for (const std::vector<float> &segment : values) all.insert(all.end(), segment.begin(), segment.end());
        return all;
    }
};

/* What encode tells beside the payload. */
struct Report {
    std::vector<uint64_t> counts;
    double squared_error = -1.0, squared_norm = -1.0;
    Bytes spoiled;

    Report(const qgenx_codebook &book, const Job &job) : counts(book.num_levels + 1, 7), spoiled(job.sizes.size(), 7) {}
    qgenx_report ask() { return {counts.data(), &squared_error, &squared_norm, spoiled.data()}; }
    bool operator==(const Report &other) const {
        return counts == other.counts && squared_error == other.squared_error && squared_norm == other.squared_norm &&
               spoiled == other.spoiled;
    }
};

/* The largest payloads fit exactly, so that a byte too many is seen. */
inline Bytes encode(const qgenx_codebook &book, const Job &job, const std::vector<float> &vector, int threads,
                    qgenx_path path, Report *report = nullptr) {
    char message[QGENX_MESSAGE];
    uint64_t bound = 0, size = 0;
    REQUIRE(qgenx_bound(&book, &job.layout, int(job.encoding.inline_codebook), &bound, message) == QGENX_OK);
    Bytes out(bound);
    Segments segments(job.sizes, vector);
    qgenx_report asked = report ? report->ask() : qgenx_report{};
    memory::Watch watch;
    REQUIRE(qgenx_encode(&book, &job.layout, &job.encoding, segments.pointers.data(), out.data(), bound, &size, &asked,
                         threads, path, message) == QGENX_OK);
    memory::check(0, threads, report ? 16 * int64_t(job.buckets()) : 0);
    REQUIRE(size <= bound);
    return Bytes(out.begin(), out.begin() + long(size));
}

/* splitmix64: the same numbers for a seed everywhere. */
struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t count) { return count ? next() % count : 0; }
    float normal() { /* nearly: a sum of four */
        float sum = 0;
        for (int i = 0; i < 4; i++) sum += float(next() >> 40) * 0x1p-24f - 0.5f;
        return sum;
    }
};

#endif
