#include "payload.h"

#include <cmath>

namespace qgenx {
namespace {

constexpr uint32_t NUM_CODERS = 6, NUM_NORMS = 2;

bool is_inline(const uint8_t *data) { return data[At::FLAGS] & FLAG_INLINE; }

/* Takes sections one after another, never past the checksum. */
struct Cursor {
    const uint8_t *at, *end;

    const uint8_t *take(const char *field, uint64_t count, uint64_t item, Failure &failure) {
        uint64_t left = uint64_t(end - at);
        if (count > left / item) { /* not count * item > left, which may wrap around */
            failure.set(QGENX_BAD_PAYLOAD, "%s need %llu items of %llu bytes, %llu bytes are left", field,
                        (unsigned long long)count, (unsigned long long)item, (unsigned long long)left);
            return nullptr;
        }
        const uint8_t *section = at;
        at += count * item;
        return section;
    }
};

#define REFUSE(condition, ...) \
    if (condition) return failure.set(QGENX_BAD_PAYLOAD, __VA_ARGS__)

int parse_fixed(const uint8_t *data, uint64_t size, int64_t expected, Checksum crc, Failure &failure) {
    REFUSE(size < At::END + CHECKSUM, "size is %llu bytes, less than a header's %u", (unsigned long long)size,
           At::END + CHECKSUM);
    REFUSE(memcmp(data + At::MAGIC, "QGNX", 4) != 0, "magic is not QGNX");
    uint16_t version = load<uint16_t>(data + At::VERSION);
    REFUSE(version != VERSION, "version is %u, this reader knows %u", version, VERSION);
    REFUSE(load<uint64_t>(data + At::SIZE) != size, "size is %llu, but %llu bytes are there",
           (unsigned long long)load<uint64_t>(data + At::SIZE), (unsigned long long)size);
    /* before single fields: after damage on the way they say nothing, and the message must not name one of them */
    REFUSE(load<uint32_t>(data + size - CHECKSUM) != crc(0, data, size - CHECKSUM),
           "checksum does not match the bytes");
    REFUSE(data[At::FLAGS] & ~FLAG_INLINE, "flags are %u, only bit 0 is known", data[At::FLAGS]);
    REFUSE(load<uint16_t>(data + At::RESERVED) != 0, "reserved is %u, not zero", load<uint16_t>(data + At::RESERVED));
    REFUSE(data[At::NORM] >= NUM_NORMS, "norm is %u, unknown", data[At::NORM]);
    REFUSE(data[At::CODER] >= NUM_CODERS, "coder is %u, unknown", data[At::CODER]);
    uint32_t num_levels = data[At::NUM_LEVELS];
    REFUSE(num_levels < 1 || num_levels > QGENX_MAX_LEVELS, "num_levels is %u", num_levels);
    uint32_t bucket_size = load<uint32_t>(data + At::BUCKET_SIZE);
    REFUSE(bucket_size < 1 || bucket_size > QGENX_MAX_BUCKET, "bucket_size is %u", bucket_size);
    uint64_t numel = load<uint64_t>(data + At::NUMEL);
    REFUSE(expected >= 0 && numel != uint64_t(expected), "numel is %llu, expected %lld", (unsigned long long)numel,
           (long long)expected);
    return QGENX_OK;
}

int parse_codebook(const uint8_t *data, Cursor &cursor, Parsed &parsed, Failure &failure) {
    qgenx_codebook &book = parsed.book;
    memset(&book, 0, sizeof(book));
    book.coder = data[At::CODER];
    book.num_levels = data[At::NUM_LEVELS];
    book.hash = load<uint64_t>(data + At::CODEBOOK);
    parsed.has_book = is_inline(data);
    /* without inline codebook the caller's takes this place once the hash has been compared */
    parsed.code = &parsed.own;
    parsed.width = book.coder == QGENX_FIXED ? uint64_t(fixed_width(int(book.num_levels))) : 0;
    if (!parsed.has_book) return QGENX_OK;
    const uint8_t *levels = cursor.take("levels", book.num_levels, 4, failure);
    if (!levels) return failure.status;
    memcpy(book.levels + 1, levels, 4 * size_t(book.num_levels));
    const uint8_t *lengths = cursor.take("code lengths", 2 * book.num_levels + 1, 1, failure);
    if (!lengths) return failure.status;
    memcpy(book.lengths, lengths, 2 * size_t(book.num_levels) + 1);
    const char *wrong = prepare(book, parsed.own, true);
    REFUSE(wrong, "codebook: %s", wrong);
    return QGENX_OK;
}

int parse_sizes(const uint8_t *data, Cursor &cursor, Layout &layout, Failure &failure) {
    layout.num_segments = load<uint32_t>(data + At::NUM_SEGMENTS);
    layout.min_numel = load<uint32_t>(data + At::MIN_NUMEL);
    layout.bucket_size = load<uint32_t>(data + At::BUCKET_SIZE);
    layout.sizes = cursor.take("sizes", layout.num_segments, 8, failure);
    if (!layout.sizes) return failure.status;
    /* counts down from numel, since a sum of sizes could wrap around to it */
    uint64_t numel = load<uint64_t>(data + At::NUMEL), left = numel;
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        uint64_t size = layout.size(segment);
        REFUSE(size > left, "sizes add up to more than numel, %llu", (unsigned long long)numel);
        left -= size;
    }
    REFUSE(left, "sizes add up to %llu less than numel", (unsigned long long)left);
    layout.count();
    return QGENX_OK;
}

/* Where each segment begins. The lengths are what finds a bucket, so that they must lead exactly to the end. */
int find_segments(Parsed &parsed, Failure &failure) {
    const Layout &layout = parsed.layout;
    Start next{0, 0, 0};
    parsed.starts.reserve(layout.num_segments);
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        parsed.starts.push_back(next);
        uint64_t left = layout.size(segment);
        if (layout.is_raw(segment)) next.raw += left;
        for (uint64_t end = next.bucket + layout.buckets_of(segment); next.bucket < end; next.bucket++) {
            uint64_t numel = left < layout.bucket_size ? left : layout.bucket_size;
            next.code += parsed.bytes_of(next.bucket, int(numel));
            left -= numel;
        }
    }
    REFUSE(next.code != parsed.coded_size, "lengths add up to %llu bytes, %llu are there",
           (unsigned long long)next.code, (unsigned long long)parsed.coded_size);
    return QGENX_OK;
}

/* What a sender never writes: it makes such numbers NaN, which alone stands for what is not finite. */
int check_values(const Parsed &parsed, Failure &failure) {
    for (uint64_t i = 0; i < parsed.layout.raw; i++)
        REFUSE(std::isinf(load<float>(parsed.raw + 4 * i)), "raw holds an infinite number");
    for (uint64_t i = 0; i < parsed.layout.buckets; i++) {
        float norm = load<float>(parsed.norms + 4 * i);
        REFUSE(norm < 0 || std::isinf(norm), "norms hold a negative or infinite number");
    }
    return QGENX_OK;
}

}  // namespace

uint64_t inline_bytes(const qgenx_codebook &book) { return 6 * uint64_t(book.num_levels) + 1; }

uint64_t bound_of(const Layout &layout, const Code &code, uint64_t inlined) {
    uint64_t coded = 0;
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        uint64_t n = layout.size(segment);
        coded += layout.buckets_of(segment) * most_bytes(code, n < layout.bucket_size ? n : layout.bucket_size);
    }
    return At::END + inlined + 8 * uint64_t(layout.num_segments) + 4 * layout.raw + 6 * layout.buckets + coded +
           CHECKSUM;
}

Sections write_header(const qgenx_codebook &book, const qgenx_encoding &encoding, const Layout &layout,
                      const Code &code, uint8_t *out) {
    memcpy(out + At::MAGIC, "QGNX", 4);
    store(out + At::VERSION, uint16_t(VERSION));
    out[At::FLAGS] = encoding.inline_codebook ? FLAG_INLINE : 0;
    out[At::NORM] = uint8_t(encoding.norm);
    out[At::CODER] = uint8_t(book.coder);
    out[At::NUM_LEVELS] = uint8_t(book.num_levels);
    store(out + At::RESERVED, uint16_t(0));
    store(out + At::SIZE, uint64_t(0)); /* known at the end */
    store(out + At::NUMEL, layout.numel);
    store(out + At::NUM_SEGMENTS, layout.num_segments);
    store(out + At::MIN_NUMEL, layout.min_numel);
    store(out + At::BUCKET_SIZE, layout.bucket_size);
    store(out + At::SEED, encoding.seed);
    store(out + At::STEP, encoding.step);
    store(out + At::RANK, encoding.rank);
    store(out + At::STREAM, encoding.stream);
    store(out + At::CODEBOOK, book.hash);
    out += At::END;
    if (encoding.inline_codebook) {
        memcpy(out, book.levels + 1, 4 * size_t(book.num_levels));
        memcpy(out + 4 * book.num_levels, book.lengths, 2 * size_t(book.num_levels) + 1);
        out += inline_bytes(book);
    }
    if (layout.num_segments) memcpy(out, layout.sizes, 8 * size_t(layout.num_segments));
    Sections sections;
    sections.raw = out + 8 * uint64_t(layout.num_segments);
    sections.norms = sections.raw + 4 * layout.raw;
    sections.lengths = code.width ? nullptr : sections.norms + 4 * layout.buckets;
    sections.coded = sections.norms + (code.width ? 4 : 6) * layout.buckets;
    return sections;
}

int parse(const uint8_t *data, uint64_t size, int64_t expected, Checksum crc, Parsed &parsed, Failure &failure) {
    if (parse_fixed(data, size, expected, crc, failure)) return failure.status;
    /* in the order of the bytes: how many items a section has is known from those before it */
    Cursor cursor{data + At::END, data + size - CHECKSUM};
    if (parse_codebook(data, cursor, parsed, failure)) return failure.status;
    if (parse_sizes(data, cursor, parsed.layout, failure)) return failure.status;
    const Layout &layout = parsed.layout;
    if (!(parsed.raw = cursor.take("raw", layout.raw, 4, failure))) return failure.status;
    if (!(parsed.norms = cursor.take("norms", layout.buckets, 4, failure))) return failure.status;
    if (check_values(parsed, failure)) return failure.status;
    parsed.lengths = nullptr;
    if (parsed.book.coder != QGENX_FIXED && !(parsed.lengths = cursor.take("lengths", layout.buckets, 2, failure)))
        return failure.status;
    parsed.coded = cursor.at;
    parsed.coded_size = uint64_t(cursor.end - cursor.at);
    return find_segments(parsed, failure);
}

}  // namespace qgenx
