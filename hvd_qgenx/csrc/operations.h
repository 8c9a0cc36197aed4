/* What the C face calls: its arguments are qgenx.h's, but for the path, which is a table of kernels here, and the message.
 */
#ifndef QGENX_OPERATIONS_H
#define QGENX_OPERATIONS_H

#include "kernels.h"
#include "payload.h"

namespace qgenx {

int encode(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding,
           const float *const *segments, uint8_t *out, uint64_t capacity, uint64_t *size, const qgenx_report &report,
           int threads, const Kernels &kernels, Failure &failure);
int quantize(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding,
             const float *const *segments, float *norms, int8_t *symbols, int threads, const Kernels &kernels,
             Failure &failure);
int decode_mean(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
                const qgenx_target &target, const Finish &finish, uint8_t *broken, int threads, const Kernels &kernels,
                Failure &failure);
int statistics(const qgenx_layout &cut, uint32_t norm, const float *const *segments, qgenx_form form, int32_t *exponent,
               int32_t minimum, int64_t *weighted, int64_t *plain, int threads, const Kernels &kernels,
               Failure &failure);
void squared_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                   double *squared_norm, int threads);

int begin(const qgenx_codebook &book, const qgenx_layout &cut, const qgenx_encoding &encoding,
          const float *const *segments, uint8_t *out, uint64_t capacity, qgenx_places &places, double *raw_squares,
          uint8_t *spoiled, const Kernels &kernels, Failure &failure);
int spoil(const qgenx_layout &cut, uint8_t *norms, uint8_t *spoiled, int *any, Failure &failure);
void seal(uint8_t *out, uint64_t size, int threads, const Kernels &kernels);
void add_raw(const uint8_t *raw, uint64_t n, float *out, bool add, const Finish &finish);
int locate(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
           const qgenx_target &target, const Finish &finish, qgenx_places *places, int64_t *raws, int64_t *buckets,
           double *most, const Kernels &kernels, Failure &failure);

/* ---- what several of them begin with ------------------------------------------------------------------------------ */

inline int check_norm(uint32_t norm, Failure &failure) {
    return norm > QGENX_LINF ? failure.set(QGENX_BAD_ARGUMENT, "norm is unknown") : int(QGENX_OK);
}

inline int prepare_code(const qgenx_codebook &book, bool reading, Code &code, Failure &failure) {
    const char *wrong = prepare(book, code, reading);
    return wrong ? failure.set(QGENX_BAD_ARGUMENT, "%s", wrong) : int(QGENX_OK);
}

}  // namespace qgenx

#endif
