/* How a vector is cut into segments, and these into buckets. */
#ifndef QGENX_LAYOUT_H
#define QGENX_LAYOUT_H

#include <cstdint>
#include <cstring>

#include "failure.h"
#include "qgenx.h"

static_assert(sizeof(float) == 4, "floats are IEEE binary32");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the payload is little-endian, and so must be the machine"
#endif

namespace qgenx {

template <class T>
inline T load(const uint8_t *at) {
    T value;
    memcpy(&value, at, sizeof(T));
    return value;
}

template <class T>
inline void store(uint8_t *at, T value) {
    memcpy(at, &value, sizeof(T));
}

/* How a vector is cut. Sizes lie in a payload or in a caller's array, maybe unaligned. */
struct Layout {
    const uint8_t *sizes = nullptr;
    uint32_t num_segments = 0, min_numel = 0, bucket_size = 1;
    uint64_t numel = 0, raw = 0, buckets = 0;

    uint64_t size(uint32_t segment) const { return load<uint64_t>(sizes + 8 * uint64_t(segment)); }
    uint64_t buckets_of(uint32_t segment) const {
        uint64_t n = size(segment);
        return is_raw(segment) ? 0 : n / bucket_size + (n % bucket_size != 0);
    }
    bool is_raw(uint32_t segment) const { return size(segment) < min_numel; }
    void count();
    bool same_buckets(const Layout &other) const {
        return min_numel == other.min_numel && bucket_size == other.bucket_size;
    }
};

/* A walk over a layout's buckets, in their order. */
struct Walk {
    const Layout &layout;
    uint32_t segment = 0;
    uint64_t segment_start = 0, offset = 0, bucket = 0; /* offset of the bucket in its segment */

    explicit Walk(const Layout &of, uint64_t to = 0) : layout(of) {
        settle();
        skip(to);
    }
    bool done() const { return segment == layout.num_segments; }
    uint64_t position() const { return segment_start + offset; }
    int numel() const {
        uint64_t left = layout.size(segment) - offset;
        return int(left < layout.bucket_size ? left : layout.bucket_size);
    }
    void next() {
        offset += layout.bucket_size;
        bucket++;
        if (offset >= layout.size(segment)) leave();
    }

  private:
    void settle() {
        while (!done() && (layout.is_raw(segment) || layout.size(segment) == 0)) {
            segment_start += layout.size(segment);
            segment++;
        }
    }
    void leave() {
        segment_start += layout.size(segment);
        segment++;
        offset = 0;
        settle();
    }
    void skip(uint64_t count) {
        while (!done() && count) {
            uint64_t all = layout.buckets_of(segment);
            if (count < all) {
                offset = count * layout.bucket_size;
                bucket += count;
                return;
            }
            count -= all;
            bucket += all;
            leave();
        }
    }
};

/* The caller's layout, if it is one. */
int prepare_layout(const qgenx_layout &cut, Layout &layout, Failure &failure);

/* Makes the norms of a segment NaN if one of them is not finite, and sets its byte of `spoiled`, unless that is NULL;
 * true if any was. */
bool spoil_segments(const Layout &layout, uint8_t *norms, uint8_t *spoiled);

}  // namespace qgenx

#endif
