/* Payloads from vectors: who rounds and codes which bucket, and where the bytes go. */
#include <algorithm>
#include <cmath>

#include "operations.h"
#include "parallel.h"

namespace qgenx {
namespace {

constexpr size_t COUNTERS = QGENX_MAX_LEVELS + 1;

/* Sums over a bucket that is finite. */
struct Sums {
    double error, squares;
};

/* One encoding, seen by all of its threads. */
struct Encoder {
    const qgenx_encoding &encoding;
    const Layout &layout;
    const Code &code;
    const Kernels &kernels;
    const float *const *segments;
    uint8_t *norms;
    Sums *sums;               /* of each bucket, or NULL if nobody asked */
    bool norms_known = false; /* a second pass, after a norm was found that is not finite */

    float norm_of(const Walk &walk, const float *values) const {
        if (norms_known) return load<float>(norms + 4 * walk.bucket);
        if (encoding.norm == QGENX_LINF) return kernels.largest(values, walk.numel());
        double squares = kernels.squares(values, walk.numel());
        if (sums) sums[walk.bucket].squares = squares; /* known already, as its norm's square */
        return l2_of(squares);
    }

    /* False if the bucket needs none: its norm says all. */
    bool symbols_of(const Walk &walk, int8_t *symbols, Scratch &scratch) const {
        const float *values = segments[walk.segment] + walk.offset;
        int n = walk.numel();
        float norm = norm_of(walk, values);
        store(norms + 4 * walk.bucket, norm);
        if (!has_code(norm) || !std::isfinite(norm)) return false; /* an infinite one becomes NaN */
        /* draws go by the place in the whole vector, so that neither threads nor paths change them */
        Draws draws{walk.position(), {encoding.key[0], encoding.key[1]}};
        kernels.round(code, values, n, norm, draws, symbols, scratch);
        if (sums) measure(walk, values, symbols, norm);
        return true;
    }

    /* While values and symbols are in the cache. */
    void measure(const Walk &walk, const float *values, const int8_t *symbols, float norm) const {
        Sums &sum = sums[walk.bucket];
        sum.error = kernels.error(code, symbols, values, walk.numel(), norm);
        if (encoding.norm == QGENX_LINF) sum.squares = kernels.squares(values, walk.numel());
    }
};

/* Copies raw segments; one with a coordinate that is not finite is sent as NaN throughout, as a coded one would be. The
 * sum of the others' squares comes back. */
double write_raw(const Encoder &e, uint8_t *raw, uint8_t *spoiled) {
    double total = 0.0;
    for (uint32_t segment = 0; segment < e.layout.num_segments; segment++) {
        uint64_t n = e.layout.size(segment);
        if (!e.layout.is_raw(segment) || !n) continue;
        const float *values = e.segments[segment];
        double squares =
            0.0; /* finite if and only if all values are: float64 holds the squares of any number of them */
        for (uint64_t i = 0; i < n; i += QGENX_MAX_BUCKET)
            squares += e.kernels.squares(values + i, int(std::min<uint64_t>(n - i, QGENX_MAX_BUCKET)));
        bool finite = std::isfinite(squares);
        if (finite) memcpy(raw, values, 4 * n);
        for (uint64_t i = 0; i < n && !finite; i++) store(raw + 4 * i, std::nanf(""));
        if (spoiled && !finite) spoiled[segment] = 1;
        total += finite ? squares : 0.0;
        raw += 4 * n;
    }
    return total;
}

/* A part of the buckets: the bytes of their code begin at `start`; their number comes back. */
uint64_t encode_part(const Encoder &e, uint64_t first, uint64_t end, uint8_t *lengths, uint8_t *start,
                     uint64_t *counts) {
    Scratch scratch(int(e.layout.bucket_size), int(e.code.nodes.size()));
    uint8_t *out = start;
    for (Walk walk(e.layout, first); walk.bucket < end; walk.next()) {
        int8_t *symbols = scratch.symbols.get();
        int size = 0;
        if (e.symbols_of(walk, symbols, scratch)) {
            if (counts) e.kernels.count(symbols, walk.numel(), e.code.num_levels, counts);
            size = e.kernels.encode(e.code, symbols, walk.numel(), out, scratch);
        }
        if (lengths) store(lengths + 2 * walk.bucket, uint16_t(size));
        out += size;
    }
    return uint64_t(out - start);
}

/* Each part writes where it would begin if all before it were as long as can be; then they are moved together. */
uint64_t encode_buckets(const Encoder &e, const Sections &sections, int threads, uint64_t *counts) {
    int parts = parts_for(e.layout.numel, e.layout.buckets, threads);
    uint64_t most = most_bytes(e.code, e.layout.bucket_size);
    std::vector<uint64_t> sizes(size_t(parts), 0), counted(counts ? COUNTERS * size_t(parts) : 0, 0);
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
                               counts ? counted.data() + COUNTERS * p : nullptr);
    });
    /* the gaps between parts close; a part moves down only, never over one that has not moved yet */
    uint8_t *end = sections.coded;
    for (size_t part = 0; part < sizes.size(); part++) {
        if (end != starts[part]) memmove(end, starts[part], sizes[part]);
        end += sizes[part];
    }
    /* each part had counters of its own, so that threads share no cache line */
    for (int index = 0; counts && index <= e.code.num_levels; index++) {
        counts[index] = 0;
        for (int part = 0; part < parts; part++) counts[index] += counted[COUNTERS * size_t(part) + size_t(index)];
    }
    return uint64_t(end - sections.coded);
}

/* In the buckets' order, so that threads do not change the sums; spoiled segments have no part in them. */
void add_sums(const Encoder &e, double raw_squares, const qgenx_report &report) {
    double error = 0.0, squares = raw_squares;
    for (uint64_t bucket = 0; bucket < e.layout.buckets; bucket++) {
        if (!std::isfinite(load<float>(e.norms + 4 * bucket))) continue;
        error += e.sums[bucket].error;
        squares += e.sums[bucket].squares;
    }
    if (report.squared_error) *report.squared_error = error;
    if (report.squared_norm) *report.squared_norm = squares;
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

/* Calls `pass`, and once more if it leaves segments that hold a number that is not finite. Only then is it known that
 * all their buckets must be NaN, and some of them have been coded already: rare enough to code everything again. */
template <class Pass>
void pass_over(Encoder &e, uint8_t *spoiled, Pass pass) {
    pass();
    if (!spoil_segments(e.layout, e.norms, spoiled)) return;
    e.norms_known = true;
    pass();
}

int check_room(uint64_t bound, uint64_t capacity, Failure &failure) {
    if (capacity >= bound) return QGENX_OK;
    return failure.set(QGENX_BAD_ARGUMENT, "out must have room for %llu bytes, got %llu", (unsigned long long)bound,
                       (unsigned long long)capacity);
}

/* All is checked before the first byte is written. */
int prepare(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding, uint64_t capacity,
            Layout &layout, Code &code, Failure &failure) {
    if (prepare_layout(cut, layout, failure) || check_norm(encoding.norm, failure)) return failure.status;
    if (prepare_code(book, false, code, failure)) return failure.status;
    return check_room(bound_of(layout, code, encoding.inline_codebook ? inline_bytes(book) : 0), capacity, failure);
}

}  // namespace

int encode(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding,
           const float *const *segments, uint8_t *out, uint64_t capacity, uint64_t *size, const qgenx_report &report,
           int threads, const Kernels &kernels, Failure &failure) {
    Code code;
    Layout layout;
    if (prepare(book, cut, encoding, capacity, layout, code, failure)) return failure.status;
    bool asked = report.squared_error || report.squared_norm;
    std::vector<Sums> sums(asked ? layout.buckets : 0);
    Sections sections = write_header(book, encoding, layout, code, out);
    Encoder encoder{encoding, layout, code, kernels, segments, sections.norms, asked ? sums.data() : nullptr};
    if (report.spoiled) memset(report.spoiled, 0, layout.num_segments);
    double raw_squares = write_raw(encoder, sections.raw, report.spoiled);
    uint64_t coded = 0;
    pass_over(encoder, report.spoiled, [&] { coded = encode_buckets(encoder, sections, threads, report.counts); });
    if (asked) add_sums(encoder, raw_squares, report);
    *size = uint64_t(sections.coded - out) + coded + CHECKSUM;
    seal(out, *size, threads, kernels);
    return QGENX_OK;
}

int quantize(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding,
             const float *const *segments, float *norms, int8_t *symbols, int threads, const Kernels &kernels,
             Failure &failure) {
    Code code;
    Layout layout;
    if (prepare_layout(cut, layout, failure) || check_norm(encoding.norm, failure)) return failure.status;
    if (prepare_code(book, false, code, failure)) return failure.status;
    Encoder encoder{encoding, layout, code, kernels, segments, reinterpret_cast<uint8_t *>(norms), nullptr};
    pass_over(encoder, nullptr, [&] {
        int parts = parts_for(layout.numel, layout.buckets, threads);
        at_once(parts, [&](int part) {
            uint64_t end = part_start(layout.buckets, part + 1, parts);
            Scratch scratch(int(layout.bucket_size), 0);
            uint64_t raw = 0; /* the raw coordinates before a bucket are not among the symbols */
            uint32_t segment = 0;
            for (Walk walk(layout, part_start(layout.buckets, part, parts)); walk.bucket < end; walk.next()) {
                for (; segment < walk.segment; segment++) raw += layout.is_raw(segment) ? layout.size(segment) : 0;
                int8_t *own = scratch.symbols.get();
                if (!encoder.symbols_of(walk, own, scratch)) memset(own, 0, size_t(walk.numel()));
                memcpy(symbols + (walk.position() - raw), own, size_t(walk.numel()));
            }
        });
    });
    return QGENX_OK;
}

/* ---- for who codes buckets elsewhere: what comes before them, and after ------------------------------------------- */

int begin(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding,
          const float *const *segments, uint8_t *out, uint64_t capacity, qgenx_places &places, double *raw_squares,
          uint8_t *spoiled, const Kernels &kernels, Failure &failure) {
    Code code;
    Layout layout;
    if (prepare(book, cut, encoding, capacity, layout, code, failure)) return failure.status;
    Sections sections = write_header(book, encoding, layout, code, out);
    memset(spoiled, 0, layout.num_segments);
    Encoder encoder{encoding, layout, code, kernels, segments, sections.norms, nullptr};
    *raw_squares = write_raw(encoder, sections.raw, spoiled);
    uint64_t lengths = sections.lengths ? uint64_t(sections.lengths - out) : 0;
    places = {uint64_t(sections.raw - out), uint64_t(sections.norms - out), lengths, uint64_t(sections.coded - out),
              layout.buckets};
    return QGENX_OK;
}

int spoil(const qgenx_layout &cut, uint8_t *norms, uint8_t *spoiled, int *any, Failure &failure) {
    Layout layout;
    if (prepare_layout(cut, layout, failure)) return failure.status;
    *any = spoil_segments(layout, norms, spoiled);
    return QGENX_OK;
}

void seal(uint8_t *out, uint64_t size, int threads, const Kernels &kernels) {
    store(out + At::SIZE, size);
    store(out + size - CHECKSUM, checksum(kernels, out, size - CHECKSUM, threads));
}

}  // namespace qgenx
