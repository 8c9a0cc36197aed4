/* Means of vectors from payloads: who decodes which bucket, and in which order they are added. */
#include <algorithm>
#include <cmath>
#include <limits>

#include "operations.h"
#include "parallel.h"

namespace qgenx {

void add_raw(const uint8_t *raw, uint64_t n, float *out, bool add, const Finish &finish) {
    for (uint64_t i = 0; i < n; i++) out[i] = finish.of((add ? out[i] : 0.0f) + load<float>(raw + 4 * i));
}

namespace {

constexpr int32_t NONE = -1;

const char *const CODERS[] = {"fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman", "elias_runs"};

/* Gives a payload without a codebook the caller's, if that is the one it names. */
int adopt(const qgenx_codebook &book, const Code &code, Parsed &parsed, Failure &failure) {
    if (parsed.has_book) return QGENX_OK;
    const qgenx_codebook &theirs = parsed.book;
    if (theirs.coder != book.coder || theirs.num_levels != book.num_levels || theirs.hash != book.hash)
        return failure.set(QGENX_BAD_PAYLOAD, "codebook is %s %u %016llx, the decoder's is %s %u %016llx",
                           CODERS[theirs.coder], theirs.num_levels, (unsigned long long)theirs.hash, CODERS[book.coder],
                           book.num_levels, (unsigned long long)book.hash);
    parsed.code = &code;
    return QGENX_OK;
}

/* One decoding, seen by all of its threads: which section of which payload is added to which segment. */
struct Decoder {
    const qgenx_target &target;
    const Finish &finish;
    const Kernels &kernels;
    std::vector<Parsed> payloads;
    std::vector<int32_t> sections; /* for each payload, for each segment: its section, or NONE */

    int32_t section(size_t payload, uint32_t segment) const {
        return sections[payload * target.num_segments + segment];
    }

    const Start &start(size_t payload, uint32_t segment) const {
        return payloads[payload].starts[size_t(section(payload, segment))];
    }

    /* Whether a payload from `first` to `end` has the segment. */
    bool any(size_t first, size_t end, uint32_t segment) const {
        for (size_t payload = first; payload < end; payload++)
            if (section(payload, segment) != NONE) return true;
        return false;
    }

    /* The target, cut as that payload is. */
    Layout layout(size_t payload) const {
        Layout layout = payloads[payload].layout;
        layout.sizes = reinterpret_cast<const uint8_t *>(target.sizes);
        layout.num_segments = target.num_segments;
        layout.count();
        return layout;
    }
};

/* A section that is added to a segment, bucket after bucket. */
struct Stream {
    const Parsed &payload;
    uint64_t bucket;
    const uint8_t *code;
    bool add;      /* to what earlier payloads gave */
    Finish finish; /* of the last payload: while the sum is in a register */

    /* Lengths are the only index: the way to a bucket within its section is their sum, far cheaper than decoding. */
    void skip(uint64_t count) {
        uint64_t bucket_size = payload.layout.bucket_size; /* only the last bucket is shorter, which is never skipped */
        for (; count; count--) code += payload.bytes_of(bucket++, int(bucket_size));
    }

    const char *decode(const Kernels &kernels, int n, float *out, Scratch &scratch) {
        uint64_t size = payload.bytes_of(bucket, n);
        float norm = payload.norm_of(bucket++);
        if (!has_code(norm)) {
            if (size) return "a bucket of norm 0 or NaN that has code";
            add_all(norm, n, out);
            return nullptr;
        }
        /* a length is the sender's word: kernels copy so many bytes into a scratch made for most_bytes */
        if (size > most_bytes(*payload.code, uint64_t(n))) return "a bucket longer than its code words can be";
        const uint8_t *bytes = code;
        code += size;
        return kernels.decode(*payload.code, bytes, int(size), n, norm, out, add, finish, scratch);
    }

    /* A bucket whose values are all 0, or all NaN. */
    void add_all(float value, int n, float *out) const {
        if (!add) std::fill(out, out + n, finish.of(value)); /* by a factor below zero, 0 becomes -0 */
        if (add && (value != 0.0f || finish.is_needed()))
            for (int i = 0; i < n; i++) out[i] = finish.of(out[i] + value);
    }
};

/* The payloads from `first` to `end` that have a segment, in their order. */
void open_streams(const Decoder &d, size_t first, size_t end, uint32_t segment, std::vector<Stream> &streams) {
    streams.clear();
    bool add = d.any(0, first, segment), more = d.any(end, d.payloads.size(), segment);
    for (size_t payload = first; payload < end; payload++) {
        if (d.section(payload, segment) == NONE) continue;
        const Parsed &parsed = d.payloads[payload];
        const Start &start = d.start(payload, segment);
        streams.push_back({parsed, start.bucket, parsed.coded + start.code, add, Finish{}});
        add = true;
    }
    if (!more && !streams.empty()) streams.back().finish = d.finish;
}

/* Raw segments are small by intent: not worth a thread. */
void decode_raw(const Decoder &d, const Layout &layout, size_t first, size_t end) {
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        if (!layout.is_raw(segment)) continue;
        bool add = d.any(0, first, segment);
        for (size_t payload = first; payload < end; payload++) {
            if (d.section(payload, segment) == NONE) continue;
            bool more = d.any(payload + 1, d.payloads.size(), segment);
            add_raw(d.payloads[payload].raw + 4 * d.start(payload, segment).raw, layout.size(segment),
                    d.target.segments[segment], add, more ? Finish{} : d.finish);
            add = true;
        }
    }
}

/* The most nodes of a code's tree. */
size_t most_nodes(const Decoder &d, size_t first, size_t end) {
    size_t nodes = 0;
    for (size_t payload = first; payload < end; payload++)
        nodes = std::max(nodes, d.payloads[payload].code->nodes.size());
    return nodes;
}

/* Some of the target's buckets, each from all payloads, one after another, while it is in the cache. */
const char *decode_part(const Decoder &d, const Layout &layout, size_t first, size_t end, uint64_t from, uint64_t to) {
    Scratch scratch(int(layout.bucket_size), int(most_nodes(d, first, end)));
    std::vector<Stream> streams;
    uint32_t segment = layout.num_segments; /* that the streams are for: none yet */
    for (Walk walk(layout, from); walk.bucket < to; walk.next()) {
        if (walk.segment != segment) {
            segment = walk.segment;
            open_streams(d, first, end, segment, streams);
            for (Stream &stream : streams) stream.skip(walk.offset / layout.bucket_size);
        }
        float *out = d.target.segments[segment] + walk.offset;
        for (Stream &stream : streams)
            if (const char *wrong = stream.decode(d.kernels, walk.numel(), out, scratch)) return wrong;
    }
    return nullptr;
}

/* Payloads from `first` to `end`, whose buckets are alike. */
int decode_alike(const Decoder &d, size_t first, size_t end, int threads, Failure &failure) {
    Layout layout = d.layout(first);
    decode_raw(d, layout, first, end);
    int parts = parts_for(layout.numel, layout.buckets, threads);
    std::vector<const char *> wrong(size_t(parts), nullptr);
    at_once(parts, [&](int part) {
        wrong[size_t(part)] = decode_part(d, layout, first, end, part_start(layout.buckets, part, parts),
                                          part_start(layout.buckets, part + 1, parts));
    });
    for (const char *why : wrong)
        if (why) return failure.set(QGENX_BAD_PAYLOAD, "coded: %s", why);
    return QGENX_OK;
}

/* Compares what a caller wants of a payload with what that has, and writes down the sections. */
int find_sections(Decoder &d, uint32_t payload, Failure &failure) {
    const Layout &layout = d.payloads[payload].layout;
    const qgenx_target &target = d.target;
    if (!target.sections && layout.num_segments != target.num_segments)
        return failure.set(QGENX_BAD_PAYLOAD, "num_segments is %u, expected %u", layout.num_segments,
                           target.num_segments);
    for (uint32_t segment = 0; segment < target.num_segments; segment++) {
        int32_t section =
            target.sections ? target.sections[size_t(payload) * target.num_segments + segment] : int32_t(segment);
        if (section < NONE) return failure.set(QGENX_BAD_ARGUMENT, "sections must be -1 or more, got %d", section);
        if (section != NONE && uint32_t(section) >= layout.num_segments)
            return failure.set(QGENX_BAD_PAYLOAD, "num_segments is %u, but section %d is wanted", layout.num_segments,
                               section);
        uint64_t size = section == NONE ? 0 : layout.size(uint32_t(section)), wanted = target.sizes[segment];
        if (size && size != wanted)
            return failure.set(QGENX_BAD_PAYLOAD, "sizes: section %d of payload %u has %llu coordinates, expected %llu",
                               section, payload, (unsigned long long)size, (unsigned long long)wanted);
        d.sections.push_back(size ? section : NONE);
    }
    return QGENX_OK;
}

/* The norms of a payload's section, or its raw coordinates. */
struct Sizes {
    const uint8_t *at;
    uint64_t count;
};

Sizes sizes_of(const Decoder &d, size_t k, uint32_t segment) {
    const Parsed &payload = d.payloads[k];
    const Start &start = d.start(k, segment);
    uint32_t section = uint32_t(d.section(k, segment));
    if (payload.layout.is_raw(section)) return {payload.raw + 4 * start.raw, payload.layout.size(section)};
    return {payload.norms + 4 * start.bucket, payload.layout.buckets_of(section)};
}

/* More than any coordinate of a segment can have come to on the way to its mean; NaN if some payload says NaN. */
double most_of(const Decoder &d, uint32_t segment) {
    double total = 0.0;
    for (size_t k = 0; k < d.payloads.size(); k++) {
        if (d.section(k, segment) == NONE) continue;
        Sizes sizes = sizes_of(d, k, segment);
        double largest = 0.0;
        for (uint64_t i = 0; i < sizes.count; i++) {
            double value = std::fabs(double(load<float>(sizes.at + 4 * i)));
            if (std::isnan(value)) return value;
            largest = std::max(largest, value);
        }
        total += largest;
    }
    return total * std::max(1.0, std::fabs(double(d.finish.factor)) / double(d.finish.divisor));
}

/* Whether a mean is not finite: NaN arrived, or a sum passed the largest float32. The means themselves are looked at
 * only where that is possible at all. */
bool is_broken(const Decoder &d, uint32_t segment) {
    double most = most_of(d, segment);
    if (most < double(std::numeric_limits<float>::max())) return false;
    if (std::isnan(most)) return true;
    const float *mean = d.target.segments[segment];
    for (uint64_t i = 0; i < d.target.sizes[segment]; i++)
        if (!std::isfinite(mean[i])) return true;
    return false;
}

/* All are checked before the first coordinate is written. */
int parse_all(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
              Code &code, Decoder &decoder, Failure &failure) {
    if (count == 0) return failure.set(QGENX_BAD_ARGUMENT, "payloads must hold at least one payload");
    if (prepare_code(book, true, code, failure)) return failure.status;
    decoder.payloads = std::vector<Parsed>(count);
    decoder.sections.reserve(size_t(count) * decoder.target.num_segments);
    for (uint32_t i = 0; i < count; i++) {
        Parsed &parsed = decoder.payloads[i];
        if (parse(payloads[i], sizes[i], -1, decoder.kernels.crc, parsed, failure)) return failure.status;
        if (adopt(book, code, parsed, failure) || find_sections(decoder, i, failure)) return failure.status;
    }
    return QGENX_OK;
}

}  // namespace

int decode_mean(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
                const qgenx_target &target, const Finish &finish, uint8_t *broken, int threads, const Kernels &kernels,
                Failure &failure) {
    Code code;
    Decoder decoder{target, finish, kernels, {}, {}};
    if (parse_all(book, payloads, sizes, count, code, decoder, failure)) return failure.status;
    bool alike = true;
    for (const Parsed &parsed : decoder.payloads)
        alike = alike && parsed.layout.same_buckets(decoder.payloads[0].layout);
    /* cut differently, buckets do not meet: then one payload after another, each over the whole target */
    for (uint32_t i = 0; i < count; i += alike ? count : 1)
        if (decode_alike(decoder, i, alike ? count : i + 1, threads, failure)) return failure.status;
    for (uint32_t segment = 0; broken && segment < target.num_segments; segment++)
        broken[segment] = is_broken(decoder, segment);
    return QGENX_OK;
}

/* ---- for who decodes buckets elsewhere: where they are, checked like here ------------------------------------------ */

int locate(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
           const qgenx_target &target, const Finish &finish, qgenx_places *places, int64_t *raws, int64_t *buckets,
           double *most, const Kernels &kernels, Failure &failure) {
    Code code;
    Decoder decoder{target, finish, kernels, {}, {}};
    if (parse_all(book, payloads, sizes, count, code, decoder, failure)) return failure.status;
    for (uint32_t i = 0; i < count; i++) {
        const Parsed &parsed = decoder.payloads[i];
        auto place = [&](const uint8_t *at) { return at ? uint64_t(at - payloads[i]) : 0; };
        places[i] = {place(parsed.raw), place(parsed.norms), place(parsed.lengths), place(parsed.coded),
                     parsed.layout.buckets};
        for (uint32_t segment = 0; segment < target.num_segments; segment++) {
            bool there = decoder.section(i, segment) != NONE;
            bool raw = there && parsed.layout.is_raw(uint32_t(decoder.section(i, segment)));
            uint64_t at = uint64_t(i) * target.num_segments + segment;
            raws[at] = raw ? int64_t(decoder.start(i, segment).raw) : NONE;
            buckets[at] = there && !raw ? int64_t(decoder.start(i, segment).bucket) : NONE;
        }
    }
    for (uint32_t segment = 0; segment < target.num_segments; segment++) most[segment] = most_of(decoder, segment);
    return QGENX_OK;
}

}  // namespace qgenx
