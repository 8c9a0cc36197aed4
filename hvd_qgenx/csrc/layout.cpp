#include "layout.h"

#include <cmath>

namespace qgenx {

void Layout::count() {
    numel = raw = buckets = 0;
    for (uint32_t segment = 0; segment < num_segments; segment++) {
        uint64_t n = size(segment);
        numel += n;
        if (is_raw(segment))
            raw += n;
        else
            buckets += n / bucket_size + (n % bucket_size != 0);
    }
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

}  // namespace qgenx
