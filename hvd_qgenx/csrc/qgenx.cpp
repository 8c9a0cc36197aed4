/* The functions of qgenx.h: each finds its path, catches what is thrown and hands on to operations.h. */
#include "qgenx.h"

#include <new>

#include "operations.h"
#include "parallel.h"

namespace qgenx {
namespace {

const Kernels &kernels_of(qgenx_path path) {
#ifdef QGENX_HAS_AVX2
    if (path == QGENX_AVX2) return avx2_kernels();
#endif
    (void)path;
    return portable_kernels();
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

int qgenx_bound(const qgenx_codebook *book, const qgenx_layout *layout, int inline_codebook, uint64_t *bound,
                char *message) {
    return guarded(message, [&](Failure &failure) {
        Code code;
        Layout cut;
        if (prepare_layout(*layout, cut, failure) || prepare_code(*book, false, code, failure)) return failure.status;
        *bound = bound_of(cut, code, inline_codebook ? inline_bytes(*book) : 0);
        return int(QGENX_OK);
    });
}

int qgenx_encode(const qgenx_codebook *book, const qgenx_layout *layout, const qgenx_encoding *encoding,
                 const float *const *segments, uint8_t *out, uint64_t capacity, uint64_t *size,
                 const qgenx_report *report, int threads, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return encode(*book, *layout, *encoding, segments, out, capacity, size, report ? *report : qgenx_report{},
                      threads, kernels_of(path), failure);
    });
}

int qgenx_quantize(const qgenx_codebook *book, const qgenx_layout *layout, const qgenx_encoding *encoding,
                   const float *const *segments, float *norms, int8_t *symbols, int threads, qgenx_path path,
                   char *message) {
    return guarded(message, [&](Failure &failure) {
        return quantize(*book, *layout, *encoding, segments, norms, symbols, threads, kernels_of(path), failure);
    });
}

int qgenx_parse(const uint8_t *payload, uint64_t size, int64_t expected, uint64_t *numel, qgenx_path path,
                char *message) {
    return guarded(message, [&](Failure &failure) {
        Parsed parsed;
        if (parse(payload, size, expected, kernels_of(path).crc, parsed, failure)) return failure.status;
        *numel = parsed.layout.numel;
        return int(QGENX_OK);
    });
}

int qgenx_decode_mean(const qgenx_codebook *book, const uint8_t *const *payloads, const uint64_t *sizes,
                      uint32_t num_payloads, const qgenx_target *target, float divisor, float factor, uint8_t *broken,
                      int threads, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return decode_mean(*book, payloads, sizes, num_payloads, *target, Finish{divisor, factor}, broken, threads,
                           kernels_of(path), failure);
    });
}

int qgenx_statistics(const qgenx_layout *layout, qgenx_norm norm, const float *const *segments, qgenx_form form,
                     int32_t *exponent, int32_t minimum, int64_t *weighted, int64_t *plain, int threads,
                     qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return statistics(*layout, norm, segments, form, exponent, minimum, weighted, plain, threads, kernels_of(path),
                          failure);
    });
}

void qgenx_squared_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                         double *squared_norm, int threads) {
    qgenx::squared_error(vector, decoded, numel, squared_error, squared_norm, threads);
}

int qgenx_begin(const qgenx_codebook *book, const qgenx_layout *layout, const qgenx_encoding *encoding,
                const float *const *segments, uint8_t *out, uint64_t capacity, qgenx_places *places,
                double *raw_squares, uint8_t *spoiled, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return begin(*book, *layout, *encoding, segments, out, capacity, *places, raw_squares, spoiled,
                     kernels_of(path), failure);
    });
}

int qgenx_spoil(const qgenx_layout *layout, uint8_t *norms, uint8_t *spoiled, int *any, char *message) {
    return guarded(message, [&](Failure &failure) { return spoil(*layout, norms, spoiled, any, failure); });
}

void qgenx_seal(uint8_t *out, uint64_t size, int threads, qgenx_path path) {
    seal(out, size, threads, kernels_of(path));
}

int qgenx_locate(const qgenx_codebook *book, const uint8_t *const *payloads, const uint64_t *sizes,
                 uint32_t num_payloads, const qgenx_target *target, float divisor, float factor, qgenx_places *places,
                 int64_t *raws, int64_t *buckets, double *most, qgenx_path path, char *message) {
    return guarded(message, [&](Failure &failure) {
        return locate(*book, payloads, sizes, num_payloads, *target, Finish{divisor, factor}, places, raws, buckets,
                      most, kernels_of(path), failure);
    });
}

void qgenx_add_raw(const uint8_t *raw, uint64_t n, float *out, int add, float divisor, float factor) {
    PlainArithmetic plain;
    add_raw(raw, n, out, add != 0, Finish{divisor, factor});
}
