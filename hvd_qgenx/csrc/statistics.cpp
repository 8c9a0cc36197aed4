/* What levels are fitted to, and how far decoded values are from the true ones. */
#include <algorithm>
#include <cmath>

#include "operations.h"
#include "parallel.h"

namespace qgenx {
namespace {

constexpr int WEIGHT_BITS = 20; /* the heaviest bucket of a vector weighs 2^19 to 2^20 */

/* What is counted of every bucket, and into what. */
struct Counting {
    const Layout &layout;
    const Kernels &kernels;
    const float *const *segments;
    const float *norms;
    qgenx_form form;
    int32_t exponent;

    int size() const { return form == QGENX_HISTOGRAM ? int(QGENX_NUM_BINS) : 3; }

    void part(uint64_t first, uint64_t end, int64_t *weighted, int64_t *plain) const {
        Scratch scratch(int(layout.bucket_size), 0);
        auto count = form == QGENX_HISTOGRAM ? kernels.histogram : kernels.moments;
        for (Walk walk(layout, first); walk.bucket < end; walk.next()) {
            float norm = norms[walk.bucket];
            if (!(norm > 0.0f) || !std::isfinite(norm)) continue;
            /* integers, which add up alike in any order: ranks and threads may differ, sums do not */
            uint32_t weight = uint32_t(std::ldexp(double(norm) * double(norm), -exponent));
            count(segments[walk.segment] + walk.offset, walk.numel(), norm, weight, weighted, plain, scratch);
        }
    }
};

int32_t exponent_of(const std::vector<float> &norms, int32_t minimum) {
    double heaviest = 0.0;
    for (float norm : norms)
        if (std::isfinite(norm)) heaviest = std::max(heaviest, double(norm) * double(norm));
    int exponent = 0;
    std::frexp(heaviest, &exponent);
    return heaviest > 0.0 ? exponent - WEIGHT_BITS : minimum;
}

}  // namespace

int statistics(const qgenx_layout &cut, uint32_t norm, const float *const *segments, qgenx_form form, int32_t *exponent,
               int32_t minimum, int64_t *weighted, int64_t *plain, int threads, const Kernels &kernels,
               Failure &failure) {
    Layout layout;
    if (prepare_layout(cut, layout, failure) || check_norm(norm, failure)) return failure.status;
    int parts = parts_for(layout.numel, layout.buckets, threads);
    /* two passes, since a bucket's weight depends on the heaviest one */
    std::vector<float> norms(layout.buckets);
    auto start = [&](int part) { return part_start(layout.buckets, part, parts); };
    at_once(parts, [&](int part) {
        for (Walk walk(layout, start(part)); walk.bucket < start(part + 1); walk.next())
            norms[walk.bucket] = kernels.norm(norm, segments[walk.segment] + walk.offset, walk.numel());
    });
    /* what encode would send as NaN must not shape the levels */
    spoil_segments(layout, reinterpret_cast<uint8_t *>(norms.data()), nullptr);
    *exponent = exponent_of(norms, minimum);
    Counting counting{layout, kernels, segments, norms.data(), form, *exponent};
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

void squared_error(const float *vector, const float *decoded, uint64_t numel, double *squared_error,
                   double *squared_norm, int threads) {
    int parts = parts_for(numel, numel, threads);
    std::vector<double> sums(2 * size_t(parts), 0.0);
    at_once(parts, [&](int part) {
        double errors[8] = {}, norms[8] = {}; /* eight sums do not wait for one another, and fill vectors */
        uint64_t end = part_start(numel, part + 1, parts);
        for (uint64_t i = part_start(numel, part, parts); i < end; i++) {
            bool finite = std::isfinite(decoded[i]); /* a spoiled segment says nothing of rounding */
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

}  // namespace qgenx
