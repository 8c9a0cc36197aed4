/* Means of vectors from payloads: who decodes which bucket, and in which order they are added. */
#include <algorithm>

#include "operations.h"
#include "parallel.h"

namespace qgenx {
namespace {

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

/* The buckets of one payload, in their order. */
struct Stream {
    const Parsed &payload;
    const uint8_t *at;

    /* lengths are the only index: the way to a part's first bucket is their sum, far cheaper than decoding */
    Stream(const Parsed &parsed, uint64_t first) : payload(parsed), at(parsed.coded) {
        for (Walk walk(parsed.layout); walk.bucket < first; walk.next())
            at += parsed.bytes_of(walk.bucket, walk.numel());
    }

    const char *decode(const Kernels &kernels, const Walk &walk, float *out, bool add, float divisor,
                       Scratch &scratch) {
        int n = walk.numel();
        uint64_t size = payload.bytes_of(walk.bucket, n);
        /* a length is the sender's word: kernels copy so many bytes into a scratch made for most_bytes */
        if (size > most_bytes(*payload.code, uint64_t(n))) return "a bucket longer than its code words can be";
        const uint8_t *bytes = at;
        at += size;
        float norm = load<float>(payload.norms + 4 * walk.bucket);
        return kernels.decode(*payload.code, bytes, int(size), n, norm, out + walk.position(), add, divisor, scratch);
    }
};

void divide(float *out, uint64_t numel, uint32_t count) {
    if (count == 1) return;
    for (uint64_t i = 0; i < numel; i++) out[i] /= float(count);
}

void add_raw(const Parsed &payload, float *out, bool add, uint32_t count) {
    const uint8_t *raw = payload.raw;
    uint64_t position = 0;
    for (uint32_t segment = 0; segment < payload.layout.num_segments; segment++) {
        uint64_t n = payload.layout.size(segment);
        for (uint64_t i = 0; payload.layout.is_raw(segment) && i < n; i++, raw += 4)
            out[position + i] = ((add ? out[position + i] : 0.0f) + load<float>(raw)) / float(count);
        position += n;
    }
}

/* All payloads of a bucket, one after another, while it is in the cache. `payloads` are cut alike. */
const char *decode_part(const std::vector<Parsed> &payloads, uint64_t first, uint64_t end, const Kernels &kernels,
                        float *out, bool add, uint32_t count) {
    std::vector<Stream> streams;
    size_t nodes = 0;
    for (const Parsed &payload : payloads) {
        streams.emplace_back(payload, first);
        nodes = std::max(nodes, payload.code->nodes.size());
    }
    Scratch scratch(int(payloads[0].layout.bucket_size), int(nodes));
    for (Walk walk(payloads[0].layout, first); walk.bucket < end; walk.next()) {
        for (size_t i = 0; i < streams.size(); i++) {
            /* the last payload's pass divides too, while the sum is in a register */
            float divisor = i + 1 < streams.size() ? 1.0f : float(count);
            const char *wrong = streams[i].decode(kernels, walk, out, add || i, divisor, scratch);
            if (wrong) return wrong;
        }
    }
    return nullptr;
}

/* Decodes payloads that are cut alike into `out`, dividing by `count` at the end. */
int decode_alike(const std::vector<Parsed> &payloads, const Kernels &kernels, float *out, bool add, uint32_t count,
                 int threads, Failure &failure) {
    const Layout &layout = payloads[0].layout;
    /* raw segments are small by intent: not worth a thread */
    for (size_t i = 0; i < payloads.size(); i++)
        add_raw(payloads[i], out, add || i, i + 1 == payloads.size() ? count : 1);
    int parts = parts_for(layout.numel, layout.buckets, threads);
    std::vector<const char *> wrong(size_t(parts), nullptr);
    at_once(parts, [&](int part) {
        wrong[size_t(part)] = decode_part(payloads, part_start(layout.buckets, part, parts),
                                          part_start(layout.buckets, part + 1, parts), kernels, out, add, count);
    });
    for (const char *why : wrong)
        if (why) return failure.set(QGENX_BAD_PAYLOAD, "coded: %s", why);
    return QGENX_OK;
}

}  // namespace

int decode_mean(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
                float *out, uint64_t numel, int threads, const Kernels &kernels, Failure &failure) {
    if (count == 0) return failure.set(QGENX_BAD_ARGUMENT, "payloads must hold at least one payload");
    Code code;
    if (const char *wrong = prepare(book, code, true)) return failure.set(QGENX_BAD_ARGUMENT, "%s", wrong);
    /* all are checked before the first coordinate is written */
    std::vector<Parsed> parsed(count);
    bool alike = true;
    for (uint32_t i = 0; i < count; i++) {
        if (parse(payloads[i], sizes[i], int64_t(numel), kernels.crc, parsed[i], failure)) return failure.status;
        if (adopt(book, code, parsed[i], failure)) return failure.status;
        alike = alike && parsed[i].layout.same_cut(parsed[0].layout);
    }
    if (alike) return decode_alike(parsed, kernels, out, false, count, threads, failure);
    /* cut differently, their buckets do not meet: one payload after another, each over the whole vector */
    for (uint32_t i = 0; i < count; i++) {
        std::vector<Parsed> one(1, parsed[i]); /* whose code is still that of parsed[i] */
        if (decode_alike(one, kernels, out, i > 0, 1, threads, failure)) return failure.status;
    }
    divide(out, numel, count);
    return QGENX_OK;
}

}  // namespace qgenx
