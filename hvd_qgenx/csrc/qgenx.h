/* The compiled core of hvd_qgenx: payloads from float vectors, means of vectors from payloads. No torch, no Python.
 *
 * What the bytes are is written in docs/wire_format.md, what the arithmetic is in hvd_qgenx/backends/specification/; this is the
 * same, fast. Two paths, AVX2 with BMI2 and portable C++17, give the same bytes.
 *
 * Simple:
 *   1. qgenx_bound        says how large a payload can become; allocate that much.
 *   2. qgenx_encode       writes the payload of segments that lie anywhere, and its true size. In the same pass it can
 *                         count what was drawn, add up the squared error, and say which segments are not finite.
 *   3. qgenx_decode_mean  checks payloads and writes the mean of what they hold of each segment to where that lies,
 *                         whichever section of each payload it is.
 * Advanced:
 *   qgenx_parse           checks a received payload, all but its code words, and says how many coordinates it holds.
 *   qgenx_quantize        the symbols that encode codes.
 *   qgenx_statistics      what levels are fitted to.
 *   qgenx_squared_error   how far a decoded vector is from the true one.
 *
 * Errors are values: every function that can fail returns QGENX_OK or another qgenx_status and puts one sentence, at
 * most QGENX_MESSAGE bytes with its end, into `message`. QGENX_BAD_PAYLOAD alone blames a payload: it is damaged, or not
 * what the caller expects; QGENX_BAD_ARGUMENT blames the caller. Nothing that a payload says is believed before it has
 * been compared with the bytes that are there. No function keeps anything between calls; all can be called at once from
 * several threads. Each uses up to `threads` threads of its own for the time of the call.
 *
 * Memory: encode and decode_mean need for each thread a scratch of at most 1.1 MB. If encode is asked for a sum, it
 * needs 16 bytes more for each bucket. decode_mean needs 100 kB more for the caller's codebook and for each payload with
 * one of its own, 6 kB for each other payload, 24 bytes for each of a payload's sections and 4 for each payload and
 * segment of the target; parse the same for its payload; statistics 4 bytes for each bucket; none a temporary of the
 * vector's size. tests/fuzz holds encode and decode_mean to it.
 */
#ifndef QGENX_H
#define QGENX_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define QGENX_API __attribute__((visibility("default")))
#else
#define QGENX_API
#endif

enum { QGENX_MAX_LEVELS = 127, QGENX_MAX_BUCKET = 16384, QGENX_MESSAGE = 256, QGENX_NUM_BINS = 513 };

typedef enum { QGENX_OK = 0, QGENX_BAD_PAYLOAD = 1, QGENX_BAD_ARGUMENT = 2, QGENX_NO_MEMORY = 3 } qgenx_status;
typedef enum { QGENX_L2 = 0, QGENX_LINF = 1 } qgenx_norm;
typedef enum {
    QGENX_FIXED = 0,
    QGENX_ELIAS_GAMMA = 1,
    QGENX_ELIAS_DELTA = 2,
    QGENX_ELIAS_OMEGA = 3,
    QGENX_HUFFMAN = 4,
    QGENX_ELIAS_RUNS = 5
} qgenx_coder;
typedef enum { QGENX_PORTABLE = 0, QGENX_AVX2 = 1 } qgenx_path;

/* Levels and the code of the symbols -s ... s. A Huffman length of 0 for symbol 0 says that zeros are coded as runs,
 * and lengths of 1 for both -1 and 1, where there are further symbols, that ones are too. */
typedef struct {
    uint32_t coder;
    uint32_t num_levels;                       /* s, 1 to 127 */
    uint64_t hash;                             /* what a payload without an inline codebook names it by */
    float levels[QGENX_MAX_LEVELS + 1];        /* 0 = l_0 < ... < l_s = 1 */
    uint8_t lengths[2 * QGENX_MAX_LEVELS + 1]; /* bits of the words of -s ... s; none for fixed */
} qgenx_codebook;

/* How coordinates are cut into segments, as a rule one for each parameter, and these into buckets. */
typedef struct {
    const uint64_t *sizes; /* coordinates of each segment */
    uint32_t num_segments;
    uint32_t min_numel;   /* segments with fewer coordinates are raw: they travel as float32 */
    uint32_t bucket_size; /* coordinates of all others that share a norm, 1 to QGENX_MAX_BUCKET */
} qgenx_layout;

/* What else a payload depends on, and its header says. */
typedef struct {
    uint64_t seed, step;
    uint32_t rank, stream;
    uint32_t key[2]; /* these four, mixed: what the draws are made of */
    uint32_t norm;
    uint32_t inline_codebook; /* whether levels and lengths travel too */
} qgenx_encoding;

/* What encode tells beside the payload: each is filled unless it is NULL. The sums are over the coordinates of segments
 * that are not spoiled. Each bucket's is that of a norm's 16 lanes; buckets are added in their order, after raw segments
 * in theirs, whose squares are summed by QGENX_MAX_BUCKET at a time: neither threads nor the path change a bit. */
typedef struct {
    uint64_t *counts;      /* s + 1: how often each index 0 ... s was drawn */
    double *squared_error; /* sum of (decoded - v)^2, `decoded` as receivers compute it, each difference in float32 */
    double *squared_norm;  /* sum of v^2, in float64 */
    uint8_t *spoiled;      /* num_segments: 1 if a coordinate, or an L2 norm, is not finite: all of it is sent as NaN */
} qgenx_report;

/* Where a mean goes. A payload's section is what it holds of a segment; `sections` has a row of num_segments for each
 * payload, which says the section that is added to each segment, or -1 where the payload has none; NULL stands for the
 * section of the segment's own number everywhere, of as many. A section of no coordinates counts as none too. */
typedef struct {
    const uint64_t *sizes;  /* coordinates of each segment, and of all its sections */
    float *const *segments; /* where they lie */
    const int32_t *sections;
    uint32_t num_segments;
} qgenx_target;

/* ---- simple: encode, and decode means ---------------------------------------------------------------------------- */

/* The fastest path that this machine has. */
QGENX_API qgenx_path qgenx_best_path(void);

QGENX_API int qgenx_bound(const qgenx_codebook *book, const qgenx_layout *layout, int inline_codebook, uint64_t *bound,
                          char *message);

/* segments[i] points to layout->sizes[i] floats; `out` has room for `capacity` bytes, at least the bound. `report` may
 * be NULL. */
QGENX_API int qgenx_encode(const qgenx_codebook *book, const qgenx_layout *layout, const qgenx_encoding *encoding,
                           const float *const *segments, uint8_t *out, uint64_t capacity, uint64_t *size,
                           const qgenx_report *report, int threads, qgenx_path path, char *message);

/* Each coordinate becomes the float32 sum of its sections' in the payloads' order, divided by `divisor`, times `factor`:
 * the mean if they are the number of payloads and 1, since a payload without the section counts as zero. A segment that
 * no payload has is left as it is. `book` is for payloads that bring none. `broken`, if not NULL, gets a byte for each
 * segment: 1 if its mean is not finite, since a payload says NaN of it or a sum passed the largest float32. Nothing is written before all payloads have been
 * checked but for their code words; after an error what the segments hold is not defined. */
QGENX_API int qgenx_decode_mean(const qgenx_codebook *book, const uint8_t *const *payloads, const uint64_t *sizes,
                                uint32_t num_payloads, const qgenx_target *target, float divisor, float factor,
                                uint8_t *broken, int threads, qgenx_path path, char *message);

/* ---- advanced: payloads and levels looked at more closely -------------------------------------------------------- */

/* `expected` coordinates, or -1 for any number. */
QGENX_API int qgenx_parse(const uint8_t *payload, uint64_t size, int64_t expected, uint64_t *numel, qgenx_path path,
                          char *message);

/* Norms and symbols of the coded segments alone, concatenated: what encode codes. */
QGENX_API int qgenx_quantize(const qgenx_codebook *book, const qgenx_layout *layout, const qgenx_encoding *encoding,
                             const float *const *segments, float *norms, int8_t *symbols, int threads, qgenx_path path,
                             char *message);

/* Of the coded segments' normalised coordinates r, signs included: histograms of |r|, QGENX_NUM_BINS integers each, or
 * the sums of 1, r and r^2. `weighted` weighs each by its bucket's squared norm in units of 2**exponent, `plain` by
 * one, or by 2^16 for the sums. `minimum` is the exponent of nothing. */
typedef enum { QGENX_HISTOGRAM = 0, QGENX_MOMENTS = 1 } qgenx_form;
QGENX_API int qgenx_statistics(const qgenx_layout *layout, qgenx_norm norm, const float *const *segments,
                               qgenx_form form, int32_t *exponent, int32_t minimum, int64_t *weighted, int64_t *plain,
                               int threads, qgenx_path path, char *message);

/* Sums, over coordinates whose `decoded` is finite, of (decoded - vector)^2 and vector^2. */
QGENX_API void qgenx_squared_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                                   double *squared_norm, int threads);

/* ---- for a device: buckets are coded there, all else is written and checked here ---------------------------------- */

/* Where a payload's sections begin, in bytes; `lengths` is 0 for the fixed code, which has none. */
typedef struct {
    uint64_t raw, norms, lengths, coded;
    uint64_t buckets;
} qgenx_places;

/* Writes header and raw segments, the only ones whose pointers are followed; norms, lengths and code are the caller's to
 * write. `raw_squares` and `spoiled` are what a report has of raw segments. */
QGENX_API int qgenx_begin(const qgenx_codebook *book, const qgenx_layout *layout, const qgenx_encoding *encoding,
                          const float *const *segments, uint8_t *out, uint64_t capacity, qgenx_places *places,
                          double *raw_squares, uint8_t *spoiled, qgenx_path path, char *message);

/* Makes all norms of a segment NaN where one is not finite; `any` says whether there was one, `spoiled` where. */
QGENX_API int qgenx_spoil(const qgenx_layout *layout, uint8_t *norms, uint8_t *spoiled, int *any, char *message);

/* Writes the size, checksum included, and the checksum. */
QGENX_API void qgenx_seal(uint8_t *out, uint64_t size, int threads, qgenx_path path);

/* Adds n raw coordinates to `out`, or to zeros, and finishes the sums, as decode_mean does. */
QGENX_API void qgenx_add_raw(const uint8_t *raw, uint64_t n, float *out, int add, float divisor, float factor);

/* What decode_mean checks before it writes, and what it then knows: `places` of each payload; for each payload and
 * segment the first raw coordinate in `raws`, or the first bucket in `buckets`, -1 where it has none; and of each
 * segment more than any coordinate's sum can come to, NaN if a payload says NaN. */
QGENX_API int qgenx_locate(const qgenx_codebook *book, const uint8_t *const *payloads, const uint64_t *sizes,
                           uint32_t num_payloads, const qgenx_target *target, float divisor, float factor,
                           qgenx_places *places, int64_t *raws, int64_t *buckets, double *most, qgenx_path path,
                           char *message);

#ifdef __cplusplus
}
#endif
#endif
