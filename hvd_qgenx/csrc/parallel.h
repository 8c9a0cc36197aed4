/* Work in several threads at once, and the arithmetic that each of them must have. */
#ifndef QGENX_PARALLEL_H
#define QGENX_PARALLEL_H

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace qgenx {

constexpr uint64_t WORTH_A_THREAD = 1 << 17; /* coordinates; starting a thread costs about as much as so many take */

/* Rounds to nearest and keeps subnormal numbers, whatever the calling thread was told. */
struct PlainArithmetic {
#if defined(__x86_64__) && defined(__GNUC__)
    unsigned before = _mm_getcsr();
    PlainArithmetic() { _mm_setcsr(0x1F80); }
    ~PlainArithmetic() { _mm_setcsr(before); }
#endif
};

/* Runs work(part) for every part at once, the last on this thread. */
template <class Work>
void at_once(int parts, Work work) {
    std::vector<std::thread> others;
    std::vector<char> starved(size_t(parts), 0); /* an exception must not leave its thread */
    auto guarded = [&work, &starved](int part) {
        PlainArithmetic plain;
        try {
            work(part);
        } catch (const std::bad_alloc &) {
            starved[size_t(part)] = 1;
        }
    };
    try {
        for (int part = 0; part + 1 < parts; part++) others.emplace_back(guarded, part);
    } catch (const std::exception &) { /* no more threads, or no memory for one: the rest is done here */
    }
    for (int part = int(others.size()); part < parts; part++) guarded(part);
    for (std::thread &other : others) other.join();
    /* only now, when no thread works on the caller's memory any more */
    for (char one : starved)
        if (one) throw std::bad_alloc();
}

/* How many threads are worth their start, at most one for each bucket. */
inline int parts_for(uint64_t numel, uint64_t buckets, int threads) {
    uint64_t worth = numel / WORTH_A_THREAD + 1;
    return int(std::max<uint64_t>(1, std::min<uint64_t>({uint64_t(std::max(threads, 1)), worth, buckets})));
}

/* The first bucket of a part; the parts' shares differ by one at most. */
inline uint64_t part_start(uint64_t buckets, int part, int parts) {
    uint64_t share = buckets / uint64_t(parts), rest = buckets % uint64_t(parts);
    return share * uint64_t(part) + std::min(uint64_t(part), rest);
}

}  // namespace qgenx

#endif
