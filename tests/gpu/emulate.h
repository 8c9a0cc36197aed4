/* What csrc/gpu takes from CUDA, on a CPU: the threads of a block as coroutines, which wait for each other wherever
 * lanes exchange something. Every operation rounds as on a GPU (compile with -ffp-contract=off).
 *
 * It sees wrong results, stray reads (with a sanitizer), and most barriers that are missing, since threads go on in an
 * order that is drawn anew at every turn. It does not see shared memory that only a shuffle orders.
 */
#ifndef QGENX_EMULATE_H
#define QGENX_EMULATE_H

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define QGENX_EMULATED
#define DEVICE static inline
#define DEVICE_MEMBER inline
#define KERNEL static void
#define ANY_KERNEL static void
#define WIDE_KERNEL static void
#define JOB(type) const type &
#define SHARED_BYTES(name) unsigned char *name = emulated::block.shared
#define ADD_LONG(at, value) (*(at) += (value))

#if defined(__SANITIZE_ADDRESS__)
#define QGENX_SLOW_SWITCH /* a sanitizer does not follow jumps between stacks */
#endif

struct Index {
    unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulated {

constexpr size_t STACK = 1 << 16;

struct Thread {
    ucontext_t start;
    jmp_buf at;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool begun = false, over = false;
};

struct Meeting {
    uint64_t slots[2][512];
    unsigned number = 0;
    int arrived = 0;
};

struct Block {
    ucontext_t scheduler;
    jmp_buf scheduler_at;
    std::vector<std::unique_ptr<Thread>> threads;
    std::function<void()> body;
    Meeting warps[16], all;
    unsigned char *shared = nullptr;
    int size = 0, current = 0;
    unsigned drawn = 0; /* a generator's state, or 0 for ascending order */
    std::vector<int> order;

    void run(int count, const std::function<void()> &each) {
        body = each;
        size = count;
        blockDim.x = unsigned(count);
        for (Meeting &warp : warps) warp.arrived = 0;
        all.arrived = 0;
        while (int(threads.size()) < count) threads.emplace_back(new Thread);
        order.resize(size_t(count));
        for (int i = 0; i < count; i++) {
            prepare(*threads[size_t(i)]);
            order[size_t(i)] = i;
        }
        for (int left = count; left;) {
            shuffle();
            for (int turn : order) {
                Thread &thread = *threads[size_t(turn)];
                if (thread.over) continue;
                current = turn;
                threadIdx.x = unsigned(turn);
                resume(thread);
                left -= thread.over;
            }
        }
    }
    void prepare(Thread &thread) {
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = &scheduler;
        makecontext(&thread.start, reinterpret_cast<void (*)()>(begin), 0);
        thread.begun = thread.over = false;
    }
#ifdef QGENX_SLOW_SWITCH
    void resume(Thread &thread) { swapcontext(&scheduler, &thread.start); }
    void yield() { swapcontext(&threads[size_t(current)]->start, &scheduler); }
    void finish() { swapcontext(&threads[size_t(current)]->start, &scheduler); }
#else
    void resume(Thread &thread) {
        if (_setjmp(scheduler_at)) return;
        if (thread.begun) _longjmp(thread.at, 1);
        thread.begun = true;
        setcontext(&thread.start);
    }
    void yield() {
        if (!_setjmp(threads[size_t(current)]->at)) _longjmp(scheduler_at, 1);
    }
    void finish() { _longjmp(scheduler_at, 1); }
#endif
    static void begin();

    void shuffle() {
        for (size_t i = order.size(); drawn && --i > 0;) {
            drawn ^= drawn << 13, drawn ^= drawn >> 17, drawn ^= drawn << 5;
            std::swap(order[i], order[drawn % (i + 1)]);
        }
    }
    /* All members' values, once all have come. */
    const uint64_t *meet(Meeting &meeting, int member, int members, uint64_t own) {
        uint64_t *values = meeting.slots[meeting.number & 1];
        unsigned mine = meeting.number;
        values[member] = own;
        if (++meeting.arrived == members) meeting.arrived = 0, meeting.number++;
        while (meeting.number == mine) yield();
        return values;
    }
    const uint64_t *meet_warp(uint64_t own) { return meet(warps[current / 32], current % 32, 32, own); }
    const uint64_t *meet_all(uint64_t own) { return meet(all, current, size, own); }
};

inline Block block;
inline void Block::begin() {
    block.body();
    block.threads[size_t(block.current)]->over = true;
    block.finish();
}

template <class T>
uint64_t packed(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
T unpacked(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}
inline int lane() { return block.current % 32; }

}  // namespace emulated

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return emulated::unpacked<T>(emulated::block.meet_warp(emulated::packed(value))[from & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int with) {
    int lane = emulated::lane();
    return emulated::unpacked<T>(emulated::block.meet_warp(emulated::packed(value))[lane ^ with]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
    int lane = emulated::lane();
    return emulated::unpacked<T>(emulated::block.meet_warp(emulated::packed(value))[lane < by ? lane : lane - by]);
}
inline unsigned __ballot_sync(unsigned, bool value) {
    const uint64_t *all = emulated::block.meet_warp(value);
    unsigned mask = 0;
    for (int lane = 0; lane < 32; lane++) mask |= unsigned(all[lane]) << lane;
    return mask;
}
inline void __syncwarp() { emulated::block.meet_warp(0); }
inline void __syncthreads() { emulated::block.meet_all(0); }
inline int __syncthreads_or(int value) {
    const uint64_t *all = emulated::block.meet_all(value != 0);
    bool any = false;
    for (int thread = 0; thread < emulated::block.size; thread++) any = any || all[thread];
    return any;
}
template <class T>
void atomicAdd(T *at, T value) {
    *at += value;
}
inline void atomicOr(unsigned *at, unsigned bits) { *at |= bits; }

inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __float_as_uint(float x) { return emulated::unpacked<unsigned>(emulated::packed(x)); }
inline float __uint_as_float(unsigned x) { return emulated::unpacked<float>(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float2uint_rn(float x) { return unsigned(std::llrint(x)); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __double2float_rn(double x) { return float(x); }

#endif
