/* The functions of qgenx.h: who does which bucket, and in which order. */
#include "qgenx.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <new>
#include <thread>

#include "kernels.h"
#include "payload.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace qgenx {
namespace {

constexpr uint64_t WORTH_A_THREAD = 1 << 17; /* coordinates; starting a thread costs about as much as so many take */

const Kernels &kernels_of(qgenx_path path) {
#ifdef QGENX_HAS_AVX2
    if (path == QGENX_AVX2) return avx2_kernels();
#endif
    (void)path;
    return portable_kernels();
}

/* Rounds to nearest and keeps subnormal numbers, whatever the calling thread was told. */
struct PlainArithmetic {
#if defined(__x86_64__) && defined(__GNUC__)
    unsigned before = _mm_getcsr();
    PlainArithmetic() { _mm_setcsr(0x1F80); }
    ~PlainArithmetic() { _mm_setcsr(before); }
#endif
};

/* Runs work(part) for every part at once, the last on this thread. */
template <class Work>
void at_once(int parts, Work work) {
    std::vector<std::thread> others;
    std::vector<char> starved(size_t(parts), 0);
    auto guarded = [&work, &starved](int part) {
        PlainArithmetic plain;
        try {
            work(part);
        } catch (const std::bad_alloc &) {
            starved[size_t(part)] = 1;
        }
    };
    try {
        for (int part = 0; part + 1 < parts; part++) others.emplace_back(guarded, part);
    } catch (const std::exception &) { /* no more threads, or no memory for one: the rest is done here */
    }
    for (int part = int(others.size()); part < parts; part++) guarded(part);
    for (std::thread &other : others) other.join();
    for (char one : starved)
        if (one) throw std::bad_alloc();
}

int parts_for(uint64_t numel, uint64_t buckets, int threads) {
    uint64_t worth = numel / WORTH_A_THREAD + 1;
    return int(std::max<uint64_t>(1, std::min<uint64_t>({uint64_t(std::max(threads, 1)), worth, buckets})));
}

uint64_t part_start(uint64_t buckets, int part, int parts) {
    uint64_t share = buckets / uint64_t(parts), rest = buckets % uint64_t(parts);
    return share * uint64_t(part) + std::min(uint64_t(part), rest);
}

Layout layout_of(const qgenx_job &job) {
    Layout layout;
    layout.sizes = reinterpret_cast<const uint8_t *>(job.sizes);
    layout.num_segments = job.num_segments;
    layout.min_numel = job.min_numel;
    layout.bucket_size = job.bucket_size;
    layout.count();
    return layout;
}

int prepare_job(const qgenx_codebook *book, const qgenx_job &job, Code &code, Failure &failure) {
    if (job.bucket_size < 1 || job.bucket_size > QGENX_MAX_BUCKET)
        return failure.set(QGENX_BAD_ARGUMENT, "bucket_size must be between 1 and %d", QGENX_MAX_BUCKET);
    if (job.norm > QGENX_LINF) return failure.set(QGENX_BAD_ARGUMENT, "norm is unknown");
    if (!book) return QGENX_OK;
    const char *wrong = prepare(*book, code, false);
    return wrong ? failure.set(QGENX_BAD_ARGUMENT, "%s", wrong) : QGENX_OK;
}

/* Copies raw segments; one with a coordinate that is not finite is sent as NaN throughout. */
void write_raw(const Layout &layout, const float *vector, uint8_t *raw) {
    uint64_t position = 0;
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        uint64_t n = layout.size(segment);
        if (layout.is_raw(segment) && n) {
            memcpy(raw, vector + position, 4 * n);
            bool finite = true;
            for (uint64_t i = 0; i < n; i++) finite = finite && std::isfinite(vector[position + i]);
            for (uint64_t i = 0; i < n && !finite; i++) store(raw + 4 * i, std::nanf(""));
            raw += 4 * n;
        }
        position += n;
    }
}

/* Makes the norms of a segment NaN if one of them is not finite; true if any was. */
bool spoil_segments(const Layout &layout, uint8_t *norms) {
    bool any = false;
    uint64_t bucket = 0;
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        if (layout.is_raw(segment)) continue;
        uint64_t end = bucket + (layout.size(segment) + layout.bucket_size - 1) / layout.bucket_size;
        bool finite = true;
        for (uint64_t b = bucket; b < end; b++) finite = finite && std::isfinite(load<float>(norms + 4 * b));
        for (uint64_t b = bucket; b < end && !finite; b++) store(norms + 4 * b, std::nanf(""));
        any = any || !finite;
        bucket = end;
    }
    return any;
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
        Draws draws{walk.position(), {job.words[0], job.words[1]}};
        if (std::isfinite(norm))
            kernels.round(code, values, n, norm, draws, symbols, scratch);
        else
            memset(symbols, 0, size_t((n + 63) & ~63));
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
    uint64_t bytes = 0;
    for (int part = 0; part < parts; part++) {
        starts.push_back(sections.coded + bytes);
        if (parts == 1) break;
        for (Walk walk(e.layout, firsts[size_t(part)]); walk.bucket < firsts[size_t(part) + 1]; walk.next())
            bytes += uint64_t(walk.numel()) == e.layout.bucket_size ? most : most_bytes(e.code, uint64_t(walk.numel()));
    }
    at_once(parts, [&](int part) {
        size_t p = size_t(part);
        sizes[p] = encode_part(e, firsts[p], firsts[p + 1], sections.lengths, starts[p],
                               counts ? counted.data() + 128 * p : nullptr);
    });
    uint8_t *end = sections.coded;
    for (size_t part = 0; part < sizes.size(); part++) {
        if (end != starts[part]) memmove(end, starts[part], sizes[part]);
        end += sizes[part];
    }
    for (size_t i = 0; i < counted.size(); i++)
        if (i % 128 <= size_t(e.code.num_levels)) counts[i % 128] += counted[i];
    return uint64_t(end - sections.coded);
}

uint32_t checksum(const Kernels &kernels, const uint8_t *data, uint64_t size, int threads) {
    int parts = parts_for(size / 4, size, threads);
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

int encode(const qgenx_codebook &book, const qgenx_job &job, const float *vector, uint8_t *out, uint64_t capacity,
           uint64_t *size, uint64_t *counts, int threads, const Kernels &kernels, Failure &failure) {
    Code code;
    if (prepare_job(&book, job, code, failure)) return failure.status;
    Layout layout = layout_of(job);
    uint64_t bound = bound_of(layout, code, job.inline_codebook ? inline_bytes(book) : 0);
    if (capacity < bound)
        return failure.set(QGENX_BAD_ARGUMENT, "out must have room for %llu bytes, got %llu",
                           (unsigned long long)bound, (unsigned long long)capacity);
    Sections sections = write_header(book, job, layout, code, out);
    write_raw(layout, vector, sections.raw);
    Encoding encoding{job, layout, code, kernels, vector, sections.norms};
    for (int index = 0; counts && index <= code.num_levels; index++) counts[index] = 0;
    uint64_t coded = encode_buckets(encoding, sections, threads, counts);
    if (spoil_segments(layout, sections.norms)) {
        encoding.norms_known = true;
        for (int index = 0; counts && index <= code.num_levels; index++) counts[index] = 0;
        coded = encode_buckets(encoding, sections, threads, counts);
    }
    *size = uint64_t(sections.coded - out) + coded + CHECKSUM;
    store(out + 12, *size);
    store(out + *size - CHECKSUM, checksum(kernels, out, *size - CHECKSUM, threads));
    return QGENX_OK;
}

int quantize(const qgenx_codebook &book, const qgenx_job &job, const float *vector, float *norms, int8_t *symbols,
             int threads, const Kernels &kernels, Failure &failure) {
    Code code;
    if (prepare_job(&book, job, code, failure)) return failure.status;
    Layout layout = layout_of(job);
    Encoding encoding{job, layout, code, kernels, vector, reinterpret_cast<uint8_t *>(norms)};
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

/* ---- decoding ---------------------------------------------------------------------------------------------------- */

const char *const CODERS[] = {"fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman", "elias_runs"};

/* Gives a payload without a codebook the caller's, if that is the one it names. */
int adopt(const qgenx_codebook &book, const Code &code, Parsed &parsed, Failure &failure) {
    if (parsed.has_book) return QGENX_OK;
    const qgenx_codebook &theirs = parsed.book;
    if (theirs.coder != book.coder || theirs.num_levels != book.num_levels || theirs.hash != book.hash)
        return failure.set(QGENX_BAD_PAYLOAD, "codebook is %s %u %016llx, the decoder's is %s %u %016llx",
                           CODERS[theirs.coder], theirs.num_levels, (unsigned long long)theirs.hash,
                           CODERS[book.coder], book.num_levels, (unsigned long long)book.hash);
    parsed.code = &code;
    return QGENX_OK;
}

/* The buckets of one payload, in their order. */
struct Stream {
    const Parsed &payload;
    const uint8_t *at;

    Stream(const Parsed &parsed, uint64_t first) : payload(parsed), at(parsed.coded) {
        for (Walk walk(parsed.layout); walk.bucket < first; walk.next())
            at += parsed.bytes_of(walk.bucket, walk.numel());
    }

    const char *decode(const Kernels &kernels, const Walk &walk, float *out, bool add, float divisor,
                       Scratch &scratch) {
        int n = walk.numel();
        uint64_t size = payload.bytes_of(walk.bucket, n);
        if (size > most_bytes(*payload.code, uint64_t(n))) return "a bucket longer than its code words can be";
        const uint8_t *bytes = at;
        at += size;
        float norm = load<float>(payload.norms + 4 * walk.bucket);
        return kernels.decode(*payload.code, bytes, int(size), n, norm, out + walk.position(), add, divisor,
                              scratch);
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

int decode_mean(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
                float *out, uint64_t numel, int threads, const Kernels &kernels, Failure &failure) {
    if (count == 0) return failure.set(QGENX_BAD_ARGUMENT, "payloads must hold at least one payload");
    Code code;
    if (const char *wrong = prepare(book, code, true)) return failure.set(QGENX_BAD_ARGUMENT, "%s", wrong);
    std::vector<Parsed> parsed(count);
    bool alike = true;
    for (uint32_t i = 0; i < count; i++) {
        if (parse(payloads[i], sizes[i], int64_t(numel), kernels, parsed[i], failure)) return failure.status;
        if (adopt(book, code, parsed[i], failure)) return failure.status;
        alike = alike && parsed[i].layout.same_cut(parsed[0].layout);
    }
    if (alike) return decode_alike(parsed, kernels, out, false, count, threads, failure);
    for (uint32_t i = 0; i < count; i++) {
        std::vector<Parsed> one(1, parsed[i]); /* whose code is still that of parsed[i] */
        if (decode_alike(one, kernels, out, i > 0, 1, threads, failure)) return failure.status;
    }
    divide(out, numel, count);
    return QGENX_OK;
}

/* ---- statistics -------------------------------------------------------------------------------------------------- */

/* What is counted of every bucket, and into what. */
struct Counting {
    const Layout &layout;
    const Kernels &kernels;
    const float *vector, *norms;
    qgenx_form form;
    int32_t exponent;

    int size() const { return form == QGENX_HISTOGRAM ? int(QGENX_NUM_BINS) : 3; }

    void part(uint64_t first, uint64_t end, int64_t *weighted, int64_t *plain) const {
        Scratch scratch(int(layout.bucket_size), 0);
        auto count = form == QGENX_HISTOGRAM ? kernels.histogram : kernels.moments;
        for (Walk walk(layout, first); walk.bucket < end; walk.next()) {
            float norm = norms[walk.bucket];
            if (!(norm > 0.0f) || !std::isfinite(norm)) continue;
            uint32_t weight = uint32_t(std::ldexp(double(norm) * double(norm), -exponent));
            count(vector + walk.position(), walk.numel(), norm, weight, weighted, plain, scratch);
        }
    }
};

int32_t exponent_of(const std::vector<float> &norms, int32_t minimum) {
    double heaviest = 0.0;
    for (float norm : norms)
        if (std::isfinite(norm)) heaviest = std::max(heaviest, double(norm) * double(norm));
    int exponent = 0;
    std::frexp(heaviest, &exponent);
    return heaviest > 0.0 ? exponent - 20 : minimum;
}

int statistics(const qgenx_job &job, const float *vector, qgenx_form form, int32_t *exponent, int32_t minimum,
               int64_t *weighted, int64_t *plain, int threads, const Kernels &kernels, Failure &failure) {
    Code none;
    if (prepare_job(nullptr, job, none, failure)) return failure.status;
    Layout layout = layout_of(job);
    int parts = parts_for(layout.numel, layout.buckets, threads);
    std::vector<float> norms(layout.buckets);
    auto start = [&](int part) { return part_start(layout.buckets, part, parts); };
    at_once(parts, [&](int part) {
        for (Walk walk(layout, start(part)); walk.bucket < start(part + 1); walk.next())
            norms[walk.bucket] = kernels.norm(job.norm, vector + walk.position(), walk.numel());
    });
    spoil_segments(layout, reinterpret_cast<uint8_t *>(norms.data()));
    *exponent = exponent_of(norms, minimum);
    Counting counting{layout, kernels, vector, norms.data(), form, *exponent};
    size_t size = size_t(counting.size());
    std::vector<int64_t> counted(2 * size * size_t(parts), 0);
    at_once(parts, [&](int part) {
        int64_t *own = counted.data() + 2 * size * size_t(part);
        counting.part(start(part), start(part + 1), own, own + size);
    });
    for (size_t i = 0; i < size; i++) {
        weighted[i] = plain[i] = 0;
        for (size_t part = 0; part < size_t(parts); part++) {
            weighted[i] += counted[2 * size * part + i];
            plain[i] += counted[2 * size * part + size + i];
        }
    }
    return QGENX_OK;
}

/* Calls `body`, which fills the failure; memory that is not there is a status too. */
template <class Body>
int guarded(char *message, Body body) {
    Failure failure{QGENX_OK, message};
    PlainArithmetic plain;
    try {
        return body(failure);
    } catch (const std::bad_alloc &) {
        return failure.set(QGENX_NO_MEMORY, "out of memory");
    }
}

}  // namespace
}  // namespace qgenx

using namespace qgenx;

qgenx_path qgenx_best_path(void) {
#ifdef QGENX_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("sse4.2"))
        return QGENX_AVX2;
#endif
    return QGENX_PORTABLE;
}

int qgenx_bound(const qgenx_codebook *book, const qgenx_job *job, uint64_t *bound, char *message) {
    return guarded(message, [&](Failure &failure) {
        Code code;
        if (prepare_job(book, *job, code, failure)) return failure.status;
        *bound = bound_of(layout_of(*job), code, job->inline_codebook ? inline_bytes(*book) : 0);
        return int(QGENX_OK);
    });
}

int qgenx_encode(const qgenx_codebook *book, const qgenx_job *job, const float *vector, uint8_t *out,
                 uint64_t capacity, uint64_t *size, uint64_t *counts, int threads, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return encode(*book, *job, vector, out, capacity, size, counts, threads, kernels_of(path), failure);
    });
}

int qgenx_quantize(const qgenx_codebook *book, const qgenx_job *job, const float *vector, float *norms,
                   int8_t *symbols, int threads, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return quantize(*book, *job, vector, norms, symbols, threads, kernels_of(path), failure);
    });
}

int qgenx_parse(const uint8_t *payload, uint64_t size, int64_t expected, uint64_t *numel, qgenx_path path,
                char *message) {
    return guarded(message, [&](Failure &failure) {
        Parsed parsed;
        if (parse(payload, size, expected, kernels_of(path), parsed, failure)) return failure.status;
        *numel = parsed.layout.numel;
        return int(QGENX_OK);
    });
}

int qgenx_decode_mean(const qgenx_codebook *book, const uint8_t *const *payloads, const uint64_t *sizes,
                      uint32_t num_payloads, float *out, uint64_t numel, int threads, qgenx_path path,
                      char *message) {
    return guarded(message, [&](Failure &failure) {
        return decode_mean(*book, payloads, sizes, num_payloads, out, numel, threads, kernels_of(path), failure);
    });
}

int qgenx_statistics(const qgenx_job *job, const float *vector, qgenx_form form, int32_t *exponent, int32_t minimum,
                     int64_t *weighted, int64_t *plain, int threads, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return statistics(*job, vector, form, exponent, minimum, weighted, plain, threads, kernels_of(path), failure);
    });
}

void qgenx_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                 double *squared_norm, int threads) {
    int parts = parts_for(numel, numel, threads);
    std::vector<double> sums(2 * size_t(parts), 0.0);
    at_once(parts, [&](int part) {
        double errors[8] = {}, norms[8] = {};
        uint64_t end = part_start(numel, part + 1, parts);
        for (uint64_t i = part_start(numel, part, parts); i < end; i++) {
            bool finite = std::isfinite(decoded[i]);
            double value = finite ? vector[i] : 0.0, error = finite ? double(decoded[i]) - value : 0.0;
            errors[i & 7] += error * error;
            norms[i & 7] += value * value;
        }
        for (int lane = 0; lane < 8; lane++) {
            sums[2 * size_t(part)] += errors[lane];
            sums[2 * size_t(part) + 1] += norms[lane];
        }
    });
    *squared_error = *squared_norm = 0.0;
    for (size_t part = 0; part < size_t(parts); part++) {
        *squared_error += sums[2 * part];
        *squared_norm += sums[2 * part + 1];
    }
}
