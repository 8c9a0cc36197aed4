/* Counts what the core allocates, and can let an allocation fail. memory.cpp replaces operator new, under which the
 * sanitizers' malloc still watches every block.
 */
#ifndef FUZZ_MEMORY_H
#define FUZZ_MEMORY_H

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace memory {

inline std::atomic<bool> watching{false};
inline std::atomic<int64_t> held{0}, most{0}; /* bytes now, and at most, since the watch began */
inline std::atomic<int64_t> left{-1};         /* allocations until one fails; negative for never */

/* Watches while it lives. */
struct Watch {
    explicit Watch(int64_t fail_after = -1) {
        held = most = 0;
        left = fail_after;
        watching = true;
    }
    ~Watch() { watching = false; }
};

/* What qgenx.h promises: a scratch for each thread, a little for each payload and the caller's codebook, and `more`. */
inline void check(int64_t payloads, int64_t threads, int64_t more = 0) {
    int64_t bound = threads * 1100000 + (payloads + 1) * 100000 + more;
    if (most <= bound) return;
    fprintf(stderr, "the core held %lld bytes, more than %lld\n", (long long)most, (long long)bound);
    abort();
}

}  // namespace memory

#endif
