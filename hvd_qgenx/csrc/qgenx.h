/* The compiled core of hvd_qgenx: payloads from float vectors, means of vectors from payloads. No torch, no Python.
 *
 * What the bytes are is written in docs/wire_format.md, what the arithmetic is in hvd_qgenx/reference.py; this is the
 * same, fast. Two paths, AVX2 with BMI2 and portable C++17, give the same bytes.
 *
 *   1. qgenx_bound        says how large a payload can become; allocate that much.
 *   2. qgenx_encode       writes the payload and its true size.
 *   3. qgenx_parse        checks a received payload, all but its code words, and says how many coordinates it holds.
 *   4. qgenx_decode_mean  checks payloads, decodes them, adds them in their order and divides by how many there are.
 *
 * Errors are values: every function that can fail returns QGENX_OK or another qgenx_status and puts one sentence, at
 * most QGENX_MESSAGE bytes with its end, into `message`. Nothing that a payload says is believed before it has been
 * compared with the bytes that are there. No function keeps anything between calls; all can be called at once from
 * several threads. Each uses up to `threads` threads of its own for the time of the call.
 *
 * Memory: encode and decode_mean need for each thread a scratch of at most 1.1 MB, decode_mean 100 kB more for the
 * caller's codebook and for each payload with one of its own, 6 kB for each other payload; statistics 4 bytes for each
 * bucket; none a temporary of the vector's size. tests/fuzz holds the first two to it.
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

/* How a vector is cut, and what its payload's header says. */
typedef struct {
    const uint64_t *sizes; /* coordinates of each segment */
    uint32_t num_segments;
    uint32_t min_numel; /* segments with fewer coordinates travel as float32 */
    uint32_t bucket_size;
    uint32_t norm;
    uint64_t seed, step;
    uint32_t rank, stream;
    uint32_t key[2];          /* these four, mixed: what the draws are made of */
    uint32_t inline_codebook; /* whether levels and lengths travel too */
} qgenx_job;

/* The fastest path that this machine has. */
QGENX_API qgenx_path qgenx_best_path(void);

QGENX_API int qgenx_bound(const qgenx_codebook *book, const qgenx_job *job, uint64_t *bound, char *message);

/* `vector` has as many floats as the job's sizes add up to; `out` has room for `capacity` bytes, at least the bound.
 * `counts`, if not NULL, gets how often each index 0..s was drawn. */
QGENX_API int qgenx_encode(const qgenx_codebook *book, const qgenx_job *job, const float *vector, uint8_t *out,
                           uint64_t capacity, uint64_t *size, uint64_t *counts, int threads, qgenx_path path,
                           char *message);

/* Norms and symbols of the coded segments alone, one behind another: what encode codes. */
QGENX_API int qgenx_quantize(const qgenx_codebook *book, const qgenx_job *job, const float *vector, float *norms,
                             int8_t *symbols, int threads, qgenx_path path, char *message);

/* `expected` coordinates, or -1 for any number. */
QGENX_API int qgenx_parse(const uint8_t *payload, uint64_t size, int64_t expected, uint64_t *numel, qgenx_path path,
                          char *message);

/* `out` has room for `numel` floats and is overwritten; `book` is for payloads that bring none. After an error what
 * `out` holds is not defined. */
QGENX_API int qgenx_decode_mean(const qgenx_codebook *book, const uint8_t *const *payloads, const uint64_t *sizes,
                                uint32_t num_payloads, float *out, uint64_t numel, int threads, qgenx_path path,
                                char *message);

/* Of the coded segments' normalised coordinates r, signs included: histograms of |r|, QGENX_NUM_BINS integers each, or
 * the sums of 1, r and r^2. `weighted` weighs each by its bucket's squared norm in units of 2**exponent, `plain` by
 * one, or by 2^16 for the sums. `minimum` is the exponent of nothing. */
typedef enum { QGENX_HISTOGRAM = 0, QGENX_MOMENTS = 1 } qgenx_form;
QGENX_API int qgenx_statistics(const qgenx_job *job, const float *vector, qgenx_form form, int32_t *exponent,
                               int32_t minimum, int64_t *weighted, int64_t *plain, int threads, qgenx_path path,
                               char *message);

/* Sums, over coordinates whose `decoded` is finite, of (decoded - vector)^2 and vector^2. */
QGENX_API void qgenx_squared_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                                   double *squared_norm, int threads);

#ifdef __cplusplus
}
#endif
#endif
