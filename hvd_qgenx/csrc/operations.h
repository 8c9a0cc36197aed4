/* What the C face calls: its arguments are qgenx.h's, but for the path, which is a table of kernels here, and the message.
 */
#ifndef QGENX_OPERATIONS_H
#define QGENX_OPERATIONS_H

#include "kernels.h"
#include "payload.h"

namespace qgenx {

/* Checks a job and fills `code` from `book`, unless that is NULL. */
int prepare_job(const qgenx_codebook *book, const qgenx_job &job, Code &code, Failure &failure);

int encode(const qgenx_codebook &book, const qgenx_job &job, const float *vector, uint8_t *out, uint64_t capacity,
           uint64_t *size, uint64_t *counts, int threads, const Kernels &kernels, Failure &failure);
int quantize(const qgenx_codebook &book, const qgenx_job &job, const float *vector, float *norms, int8_t *symbols,
             int threads, const Kernels &kernels, Failure &failure);
int decode_mean(const qgenx_codebook &book, const uint8_t *const *payloads, const uint64_t *sizes, uint32_t count,
                float *out, uint64_t numel, int threads, const Kernels &kernels, Failure &failure);
int statistics(const qgenx_job &job, const float *vector, qgenx_form form, int32_t *exponent, int32_t minimum,
               int64_t *weighted, int64_t *plain, int threads, const Kernels &kernels, Failure &failure);
void squared_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                   double *squared_norm, int threads);

}  // namespace qgenx

#endif
