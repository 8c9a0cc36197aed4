/* What levels are fitted to: norms, and then histograms or moments, which are integers and add up alike in any order.
 * One warp goes through a bucket of any size.
 */
#ifndef QGENX_GPU_MEASURE_H
#define QGENX_GPU_MEASURE_H

#include "rounding.h"

namespace qgenx {

DEVICE const float *values_of(const MeasureJob &job, const Bucket &place) {
    return job.segments[place.segment] + place.offset;
}

DEVICE void norm_bucket(const MeasureJob &job, long long bucket, int lane) {
    Bucket place = job.buckets[bucket];
    const float *values = values_of(job, place);
    double sum = 0.0;
    unsigned most = 0;
    for (int start = 0; start < place.count; start += 32) {
        float value = start + lane < place.count ? values[start + lane] : 0.0f;
        unsigned bits = __float_as_uint(value) & 0x7FFFFFFFu;
        most = bits > most ? bits : most;
        sum = add_squares(sum, value);
    }
    float norm = job.linf ? __uint_as_float(highest_of(most)) : root_of(fold(sum, 0));
    if (lane == 0) job.norms[bucket] = norm;
}

/* |v| / norm, at most 1. */
struct Normalised {
    float scale, inverse;
    DEVICE_MEMBER explicit Normalised(float norm)
        : scale(scale_of(norm)), inverse(__fdiv_rn(1.0f, __fmul_rn(norm, scale))) {}
    DEVICE_MEMBER float of(float value) const {
        return fminf(__fmul_rn(fabsf(__fmul_rn(value, scale)), inverse), 1.0f);
    }
};

/* 32 bins to the octave from 2^-16 on, and one for all that is smaller. */
DEVICE int bin_of(float magnitude) {
    int bin = int(__float_as_uint(magnitude) >> 18) - ((127 - 16) << 5) + 1;
    return bin < 0 ? 0 : bin > NUM_BINS - 1 ? NUM_BINS - 1 : bin;
}

DEVICE void histogram_bucket(const MeasureJob &job, long long bucket, int lane, unsigned *bins) {
    float norm = job.norms[bucket];
    if (!has_code(norm)) return;
    Bucket place = job.buckets[bucket];
    const float *values = values_of(job, place);
    Normalised normalised(norm);
    for (int bin = lane; bin < NUM_BINS; bin += 32) bins[bin] = 0;
    __syncwarp();
    for (int i = lane; i < place.count; i += 32) atomicAdd(bins + bin_of(normalised.of(values[i])), 1u);
    __syncwarp();
    long long copy = bucket % COPIES * NUM_BINS;
    for (int bin = lane; bin < NUM_BINS; bin += 32) {
        if (!bins[bin]) continue;
        add_to(job.weighted + copy + bin, (long long)job.weights[bucket] * bins[bin]);
        add_to(job.plain + copy + bin, bins[bin]);
    }
    __syncwarp();
}

DEVICE long long sum_of(long long own) {
#pragma unroll
    for (int half = 16; half; half >>= 1) own += __shfl_xor_sync(ALL, own, half);
    return own;
}

/* The sums of 1, r and r^2 in units of 2^-16. */
DEVICE void moments_bucket(const MeasureJob &job, long long bucket, int lane) {
    float norm = job.norms[bucket];
    if (!has_code(norm)) return;
    Bucket place = job.buckets[bucket];
    const float *values = values_of(job, place);
    Normalised normalised(norm);
    long long sums[3] = {(long long)place.count << 16, 0, 0};
    for (int i = lane; i < place.count; i += 32) {
        long long r = __float2uint_rn(__fmul_rn(normalised.of(values[i]), 65536.0f));
        sums[1] += values[i] < 0.0f ? -r : r;
        sums[2] += r * r >> 16;
    }
    sums[1] = sum_of(sums[1]), sums[2] = sum_of(sums[2]);
    for (int power = 0; power < 3 && lane == 0; power++) {
        add_to(job.weighted + bucket % COPIES * 3 + power, (long long)job.weights[bucket] * sums[power] >> 16);
        add_to(job.plain + bucket % COPIES * 3 + power, sums[power]);
    }
}

}  // namespace qgenx

#endif
