/* The kernels of csrc/gpu as a library for the CPU: g++ -std=c++17 -O2 -ffp-contract=off -shared -fPIC. */
#include "emulate.h"

#include "kernels.cu"

namespace {

struct Entry {
    const char *name;
    void (*call)(const void *job);
};

template <class Job, void (*KERNEL_OF)(const Job &)>
void call(const void *job) {
    KERNEL_OF(*static_cast<const Job *>(job));
}

const Entry ENTRIES[] = {
    {"encode_uniform", call<EncodeJob, encode_uniform>},
    {"encode_few", call<EncodeJob, encode_few>},
    {"encode_any", call<EncodeJob, encode_any>},
    {"encode_wide", call<EncodeJob, encode_wide>},
    {"gather", call<GatherJob, gather>},
    {"decode_few", call<DecodeJob, decode_few>},
    {"decode_any", call<DecodeJob, decode_any>},
    {"decode_wide", call<DecodeJob, decode_wide>},
    {"norms", call<MeasureJob, norms>},
    {"histogram", call<MeasureJob, histogram>},
    {"moments", call<MeasureJob, moments>},
};

/* A GPU knows nothing of how this thread treats subnormal numbers. */
struct PlainArithmetic {
#if defined(__SSE__)
    unsigned before = __builtin_ia32_stmxcsr();
    PlainArithmetic() { __builtin_ia32_ldmxcsr(0x1F80); }
    ~PlainArithmetic() { __builtin_ia32_ldmxcsr(before); }
#endif
};

}  // namespace

/* Runs a grid, block after block; 1 if there is no kernel of that name. Shared memory is as large as asked for, to the
 * byte, and holds rubbish at first. */
extern "C" int emulated_launch(const char *name, const void *job, unsigned blocks, int threads, unsigned shared_bytes) {
    PlainArithmetic plain;
    for (const Entry &entry : ENTRIES) {
        if (strcmp(entry.name, name)) continue;
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
            void *shared = aligned_alloc(16, (shared_bytes + 15) / 16 * 16);
            memset(shared, 0xA5, (shared_bytes + 15) / 16 * 16);
            emulated::block.shared = static_cast<unsigned char *>(shared);
            emulated::block.run(threads, [&] { entry.call(job); });
            free(shared);
        }
        return 0;
    }
    return 1;
}

/* Threads go on in an order that this draws, at every turn another; 0 for ascending order. */
extern "C" void emulated_order(unsigned seed) { emulated::block.drawn = seed; }

/* Bytes of the structures that Python has too. */
extern "C" unsigned emulated_size(const char *name) {
    if (!strcmp(name, "Book")) return sizeof(Book);
    if (!strcmp(name, "Bucket")) return sizeof(Bucket);
    if (!strcmp(name, "EncodeJob")) return sizeof(EncodeJob);
    if (!strcmp(name, "GatherJob")) return sizeof(GatherJob);
    if (!strcmp(name, "DecodeJob")) return sizeof(DecodeJob);
    return !strcmp(name, "MeasureJob") ? unsigned(sizeof(MeasureJob)) : 0;
}
