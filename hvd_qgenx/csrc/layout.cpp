#include "layout.h"

#include <cmath>

namespace qgenx {

void Layout::count() {
    numel = raw = buckets = 0;
    for (uint32_t segment = 0; segment < num_segments; segment++) {
        numel += size(segment);
        if (is_raw(segment)) raw += size(segment);
        buckets += buckets_of(segment);
    }
}

int prepare_layout(const qgenx_layout &cut, Layout &layout, Failure &failure) {
    if (cut.bucket_size < 1 || cut.bucket_size > QGENX_MAX_BUCKET)
        return failure.set(QGENX_BAD_ARGUMENT, "bucket_size must be between 1 and %d", QGENX_MAX_BUCKET);
    layout.sizes = reinterpret_cast<const uint8_t *>(cut.sizes);
    layout.num_segments = cut.num_segments;
    layout.min_numel = cut.min_numel;
    layout.bucket_size = cut.bucket_size;
    layout.count();
    return QGENX_OK;
}

bool spoil_segments(const Layout &layout, uint8_t *norms, uint8_t *spoiled) {
    bool any = false;
    uint64_t bucket = 0;
    for (uint32_t segment = 0; segment < layout.num_segments; segment++) {
        uint64_t end = bucket + layout.buckets_of(segment);
        bool finite = true;
        for (uint64_t b = bucket; b < end; b++) finite = finite && std::isfinite(load<float>(norms + 4 * b));
        for (uint64_t b = bucket; b < end && !finite; b++) store(norms + 4 * b, std::nanf(""));
        if (spoiled && !finite) spoiled[segment] = 1;
        any = any || !finite;
        bucket = end;
    }
    return any;
}

}  // namespace qgenx
