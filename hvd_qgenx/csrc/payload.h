/* The bytes around the code words: header and sections, as docs/wire_format.md lists them. */
#ifndef QGENX_PAYLOAD_H
#define QGENX_PAYLOAD_H

#include <vector>

#include "checksum.h"
#include "code.h"
#include "failure.h"
#include "layout.h"

namespace qgenx {

constexpr uint32_t VERSION = 4, CHECKSUM = 4; /* the latter in bytes */

/* Where the header's fields begin, and after them where it ends. */
struct At {
    enum : uint32_t {
        MAGIC = 0,
        VERSION = 4,
        FLAGS = 6,
        NORM = 7,
        CODER = 8,
        NUM_LEVELS = 9,
        RESERVED = 10,
        SIZE = 12,
        NUMEL = 20,
        NUM_SEGMENTS = 28,
        MIN_NUMEL = 32,
        BUCKET_SIZE = 36,
        SEED = 40,
        STEP = 48,
        RANK = 56,
        STREAM = 60,
        CODEBOOK = 64,
        END = 72
    };
};

constexpr uint8_t FLAG_INLINE = 1; /* of At::FLAGS: levels and code lengths follow the header */

/* Whether a bucket has any code: norms of 0 and NaN say all of it. */
inline bool has_code(float norm) { return norm > 0.0f; }

/* Where a segment begins: counted in raw coordinates, in buckets, in bytes of code. */
struct Start {
    uint64_t raw, bucket, code;
};

/* A payload whose sizes have been compared with its bytes. */
struct Parsed {
    Layout layout;
    qgenx_codebook book;
    bool has_book;
    Code own;                                     /* prepared from the payload's codebook, if it has one */
    const Code *code;                             /* that, or what decode_mean has from its caller */
    uint64_t width;                               /* of the fixed code, else 0 */
    const uint8_t *raw, *norms, *lengths, *coded; /* lengths is NULL for the fixed code */
    uint64_t coded_size;
    std::vector<Start> starts; /* of its segments */

    float norm_of(uint64_t bucket) const { return load<float>(norms + 4 * bucket); }

    uint64_t bytes_of(uint64_t bucket, int numel) const {
        if (lengths) return load<uint16_t>(lengths + 2 * bucket);
        return has_code(norm_of(bucket)) ? (uint64_t(numel) * width + 7) / 8 : 0;
    }
};

/* Where encode puts the sections. */
struct Sections {
    uint8_t *raw, *norms, *lengths, *coded;
};

uint64_t inline_bytes(const qgenx_codebook &book);
uint64_t bound_of(const Layout &layout, const Code &code, uint64_t inlined);
Sections write_header(const qgenx_codebook &book, const qgenx_encoding &encoding, const Layout &layout,
                      const Code &code, uint8_t *out);
int parse(const uint8_t *data, uint64_t size, int64_t expected, Checksum crc, Parsed &parsed, Failure &failure);

}  // namespace qgenx

#endif
