/* Payloads from vectors: who rounds and codes which bucket, and where the bytes go. */
#include <algorithm>
#include <cmath>

#include "operations.h"
#include "parallel.h"

namespace qgenx {
namespace {

/* Copies raw segments; one with a coordinate that is not finite is sent as NaN throughout. */
void write_raw(const Layout &layout, const float *vector, uint8_t *raw) {
    uint64_t position = 0;
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        uint64_t n = layout.size(segment);
        if (layout.is_raw(segment) && n) {
            memcpy(raw, vector + position, 4 * n);
            /* one bad coordinate says that the whole gradient cannot be trusted, as a norm does in coded segments */
            bool finite = true;
            for (uint64_t i = 0; i < n; i++) finite = finite && std::isfinite(vector[position + i]);
            for (uint64_t i = 0; i < n && !finite; i++) store(raw + 4 * i, std::nanf(""));
            raw += 4 * n;
        }
        position += n;
    }
}

/* One encoding, seen by all of its threads. */
struct Encoding {
    const qgenx_job &job;
    const Layout &layout;
    const Code &code;
    const Kernels &kernels;
    const float *vector;
    uint8_t *norms;
    bool norms_known = false; /* a second pass, after a norm was found that is not finite */

    void symbols_of(const Walk &walk, int8_t *symbols, Scratch &scratch) const {
        const float *values = vector + walk.position();
        int n = walk.numel();
        uint8_t *place = norms + 4 * walk.bucket;
        float norm = norms_known ? load<float>(place) : kernels.norm(job.norm, values, n);
        store(place, norm);
        /* draws go by the place in the whole vector, so that neither threads nor paths change them */
        Draws draws{walk.position(), {job.key[0], job.key[1]}};
        if (std::isfinite(norm))
            kernels.round(code, values, n, norm, draws, symbols, scratch);
        else
            memset(symbols, 0, size_t((n + 63) & ~63)); /* whole masks: the coder reads 64 symbols at a time */
    }
};

void count_symbols(const int8_t *symbols, int n, int num_levels, uint64_t *counts) {
    uint32_t tables[4][256] = {}; /* neighbours are often equal: four counters do not wait for one another */
    for (int i = 0; i < n; i++) tables[i & 3][uint8_t(symbols[i])]++;
    for (int symbol = -num_levels; symbol <= num_levels; symbol++)
        for (auto &table : tables) counts[std::abs(symbol)] += table[uint8_t(symbol)];
}

/* A part of the buckets: the bytes of their code begin at `start`; their number comes back. */
uint64_t encode_part(const Encoding &e, uint64_t first, uint64_t end, uint8_t *lengths, uint8_t *start,
                     uint64_t *counts) {
    Scratch scratch(int(e.layout.bucket_size), int(e.code.nodes.size()));
    uint8_t *out = start;
    for (Walk walk(e.layout, first); walk.bucket < end; walk.next()) {
        int8_t *symbols = scratch.symbols.get();
        e.symbols_of(walk, symbols, scratch);
        if (counts) count_symbols(symbols, walk.numel(), e.code.num_levels, counts);
        int size = e.kernels.encode(e.code, symbols, walk.numel(), out, scratch);
        if (lengths) store(lengths + 2 * walk.bucket, uint16_t(size));
        out += size;
    }
    return uint64_t(out - start);
}

/* Each part writes where it would begin if all before it were as long as can be; then they are moved together. */
uint64_t encode_buckets(const Encoding &e, const Sections &sections, int threads, uint64_t *counts) {
    int parts = parts_for(e.layout.numel, e.layout.buckets, threads);
    uint64_t most = most_bytes(e.code, e.layout.bucket_size);
    std::vector<uint64_t> sizes(size_t(parts), 0), counted(counts ? 128 * size_t(parts) : 0, 0);
    std::vector<uint8_t *> starts;
    std::vector<uint64_t> firsts;
    for (int part = 0; part <= parts; part++) firsts.push_back(part_start(e.layout.buckets, part, parts));
    /* where a part really begins is known only when those before it are coded; the bound on `out` covers the worst */
    uint64_t bytes = 0;
    for (int part = 0; part < parts; part++) {
        starts.push_back(sections.coded + bytes);
        if (parts == 1) break; /* no other to make room for, so no walk over all buckets */
        for (Walk walk(e.layout, firsts[size_t(part)]); walk.bucket < firsts[size_t(part) + 1]; walk.next())
            bytes += uint64_t(walk.numel()) == e.layout.bucket_size ? most : most_bytes(e.code, uint64_t(walk.numel()));
    }
    at_once(parts, [&](int part) {
        size_t p = size_t(part);
        sizes[p] = encode_part(e, firsts[p], firsts[p + 1], sections.lengths, starts[p],
                               counts ? counted.data() + 128 * p : nullptr);
    });
    /* the gaps between parts close; a part moves down only, never over one that has not moved yet */
    uint8_t *end = sections.coded;
    for (size_t part = 0; part < sizes.size(); part++) {
        if (end != starts[part]) memmove(end, starts[part], sizes[part]);
        end += sizes[part];
    }
    /* each part had counters of its own, so that threads share no cache line */
    for (size_t i = 0; i < counted.size(); i++)
        if (i % 128 <= size_t(e.code.num_levels)) counts[i % 128] += counted[i];
    return uint64_t(end - sections.coded);
}

/* That of all bytes, from those of pieces that threads work on at once. */
uint32_t checksum(const Kernels &kernels, const uint8_t *data, uint64_t size, int threads) {
    int parts = parts_for(size / 4, size, threads); /* a byte takes a fraction of what a coordinate does */
    std::vector<uint32_t> crcs(size_t(parts), 0);
    std::vector<uint64_t> starts;
    for (int part = 0; part <= parts; part++) starts.push_back(part_start(size, part, parts));
    at_once(parts, [&](int part) {
        size_t p = size_t(part);
        crcs[p] = kernels.crc(0, data + starts[p], starts[p + 1] - starts[p]);
    });
    uint32_t crc = crcs[0];
    for (size_t part = 1; part < crcs.size(); part++)
        crc = crc_shift(crc, starts[part + 1] - starts[part]) ^ crcs[part];
    return crc;
}

}  // namespace

int prepare_job(const qgenx_codebook *book, const qgenx_job &job, Code &code, Failure &failure) {
    if (job.bucket_size < 1 || job.bucket_size > QGENX_MAX_BUCKET)
        return failure.set(QGENX_BAD_ARGUMENT, "bucket_size must be between 1 and %d", QGENX_MAX_BUCKET);
    if (job.norm > QGENX_LINF) return failure.set(QGENX_BAD_ARGUMENT, "norm is unknown");
    if (!book) return QGENX_OK;
    const char *wrong = prepare(*book, code, false);
    return wrong ? failure.set(QGENX_BAD_ARGUMENT, "%s", wrong) : QGENX_OK;
}

int encode(const qgenx_codebook &book, const qgenx_job &job, const float *vector, uint8_t *out, uint64_t capacity,
           uint64_t *size, uint64_t *counts, int threads, const Kernels &kernels, Failure &failure) {
    Code code;
    if (prepare_job(&book, job, code, failure)) return failure.status;
    Layout layout = layout_of(job);
    uint64_t bound = bound_of(layout, code, job.inline_codebook ? inline_bytes(book) : 0);
    if (capacity < bound)
        return failure.set(QGENX_BAD_ARGUMENT, "out must have room for %llu bytes, got %llu", (unsigned long long)bound,
                           (unsigned long long)capacity);
    Sections sections = write_header(book, job, layout, code, out);
    write_raw(layout, vector, sections.raw);
    Encoding encoding{job, layout, code, kernels, vector, sections.norms};
    for (int index = 0; counts && index <= code.num_levels; index++) counts[index] = 0;
    uint64_t coded = encode_buckets(encoding, sections, threads, counts);
    /* Only now is it known which segments hold a number that is not finite. All their buckets must be NaN, and those of
     * their buckets that were finite have been coded already: rare enough to code everything once more. */
    if (spoil_segments(layout, sections.norms)) {
        encoding.norms_known = true;
        for (int index = 0; counts && index <= code.num_levels; index++) counts[index] = 0;
        coded = encode_buckets(encoding, sections, threads, counts);
    }
    *size = uint64_t(sections.coded - out) + coded + CHECKSUM;
    store(out + At::SIZE, *size);
    store(out + *size - CHECKSUM, checksum(kernels, out, *size - CHECKSUM, threads));
    return QGENX_OK;
}

int quantize(const qgenx_codebook &book, const qgenx_job &job, const float *vector, float *norms, int8_t *symbols,
             int threads, const Kernels &kernels, Failure &failure) {
    Code code;
    if (prepare_job(&book, job, code, failure)) return failure.status;
    Layout layout = layout_of(job);
    Encoding encoding{job, layout, code, kernels, vector, reinterpret_cast<uint8_t *>(norms)};
    /* twice if a segment is spoiled, as in encode */
    auto all = [&] {
        int parts = parts_for(layout.numel, layout.buckets, threads);
        at_once(parts, [&](int part) {
            uint64_t end = part_start(layout.buckets, part + 1, parts);
            Scratch scratch(int(layout.bucket_size), 0);
            uint64_t raw = 0; /* the raw coordinates before a bucket are not among the symbols */
            uint32_t segment = 0;
            for (Walk walk(layout, part_start(layout.buckets, part, parts)); walk.bucket < end; walk.next()) {
                for (; segment < walk.segment; segment++) raw += layout.is_raw(segment) ? layout.size(segment) : 0;
                encoding.symbols_of(walk, scratch.symbols.get(), scratch);
                memcpy(symbols + (walk.position() - raw), scratch.symbols.get(), size_t(walk.numel()));
            }
        });
    };
    all();
    if (spoil_segments(layout, encoding.norms)) {
        encoding.norms_known = true;
        all();
    }
    return QGENX_OK;
}

}  // namespace qgenx
