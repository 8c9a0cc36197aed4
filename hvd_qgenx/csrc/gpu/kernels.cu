/* The entry points. NVRTC compiles them for a GPU; tests/gpu/emulate.h runs the same text on a CPU.
 *
 * Kernels of few levels, words of up to eight bits and buckets of up to 1024 coordinates are for what most gradients
 * have; the `any` ones take all settings. A block has WARPS warps with a bucket each, or one long bucket.
 */
#ifndef QGENX_EMULATED
#define DEVICE __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, 5) /* at most 96 registers */
#define ANY_KERNEL \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) /* at most 128: with 96 some would spill */
#define WIDE_KERNEL extern "C" __global__ void __launch_bounds__(32 * MOST_WARPS) /* the same */
#define JOB(type) const __grid_constant__ type
#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define ADD_LONG(at, value) atomicAdd(reinterpret_cast<unsigned long long *>(at), (unsigned long long)(value))
#endif

namespace qgenx {
DEVICE void add_to(long long *at, long long value) { ADD_LONG(at, value); }
}  // namespace qgenx

#include "decode.h"
#include "measure.h"

using namespace qgenx;

constexpr int WARPS = 4;

/* Shared memory is handed out from its start. */
struct Shelf {
    unsigned char *next;
    template <class T>
    DEVICE_MEMBER T *take(int count) {
        T *taken = reinterpret_cast<T *>(next);
        next += (sizeof(T) * unsigned(count) + 15) / 16 * 16;
        return taken;
    }
};

/* A group's room. A long bucket's rows lie where its code does, since they are not needed at once. */
template <bool WIDE>
DEVICE Room room_of(Shelf &shelf, int words, int warps) {
    Room room;
    int groups = WIDE ? 1 : WARPS, own = WIDE ? 0 : int(threadIdx.x / 32);
    room.board = shelf.take<int>(MOST_WARPS + 4);
    room.carry = shelf.take<double>(16);
    int rows = ROWS * (WIDE ? warps : 1), code = 4 * ((words + 7) / 4 * 4);
    if (WIDE) {
        room.rows = shelf.take<unsigned char>(rows > code ? rows : code);
        room.code = reinterpret_cast<unsigned *>(room.rows);
        return room;
    }
    unsigned char *all = shelf.take<unsigned char>(groups * (rows + code));
    room.rows = all + own * (rows + code);
    room.code = reinterpret_cast<unsigned *>(room.rows + rows);
    return room;
}

template <bool WIDE>
DEVICE Group<WIDE> group_of(int warps, int *board) {
    return Group<WIDE>{int(threadIdx.x % 32), WIDE ? int(threadIdx.x / 32) : 0, warps, board};
}

DEVICE void load_tables(const Book &book, Tables &tables) {
    for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x)) {
        tables.words[i] = book.words[i];
        if (i > MOST_LEVELS) continue;
        tables.levels[i] = book.levels[i];
        tables.gaps[i] = book.gaps[i];
        tables.counts[i] = 0;
    }
    __syncthreads();
}

/* What is there of few levels: a thread has one of each, or four bins. */
DEVICE void load_few(const Book &book, Tables &tables) {
    int i = int(threadIdx.x);
    if (i < NUM_FEW_BINS / 4)
        reinterpret_cast<unsigned *>(tables.bins)[i] = reinterpret_cast<const unsigned *>(book.bins)[i];
    if (i < 8) {
        tables.levels[i] = book.levels[i];
        tables.gaps[i] = book.gaps[i];
        tables.pairs[i] = Level{book.levels[i], __fmul_rn(book.gaps[i], 0x1p31f)};
        tables.counts[i] = 0;
    }
    __syncthreads();
}

DEVICE void add_counts(const EncodeJob &job, const Tables &tables) {
    __syncthreads();
    for (int i = int(threadIdx.x); i <= job.book.num_levels; i += int(blockDim.x))
        if (tables.counts[i])
            atomicAdd(job.counts + (blockIdx.x % COPIES) * (MOST_LEVELS + 1) + i, (unsigned long long)tables.counts[i]);
}

template <Search SEARCH, bool WIDE>
DEVICE void encode(const EncodeJob &job, unsigned char *shared) {
    Shelf shelf{shared};
    Tables *tables = shelf.take<Tables>(1);
    Room room = room_of<WIDE>(shelf, SEARCH == Search::ANY ? job.stride + 2 : FEW_WORDS, job.warps);
    Group<WIDE> group = group_of<WIDE>(job.warps, room.board);
    if (SEARCH == Search::ANY)
        load_tables(job.book, *tables);
    else
        load_few(job.book, *tables);
    long long bucket = WIDE ? (long long)blockIdx.x : (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (bucket < job.num_buckets) encode_bucket<SEARCH>(job, unsigned(bucket), group, room, *tables, tables->counts);
    add_counts(job, *tables);
}

KERNEL encode_uniform(JOB(EncodeJob) job) {
    SHARED_BYTES(shared);
    encode<Search::UNIFORM, false>(job, shared);
}

KERNEL encode_few(JOB(EncodeJob) job) {
    SHARED_BYTES(shared);
    encode<Search::FEW, false>(job, shared);
}

ANY_KERNEL encode_any(JOB(EncodeJob) job) {
    SHARED_BYTES(shared);
    encode<Search::ANY, false>(job, shared);
}

WIDE_KERNEL encode_wide(JOB(EncodeJob) job) {
    SHARED_BYTES(shared);
    encode<Search::ANY, true>(job, shared);
}

KERNEL gather(JOB(GatherJob) job) {
    long long bucket = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (bucket < job.num_buckets) gather_bucket(job, bucket, int(threadIdx.x % 32));
}

DEVICE float value_of(const Book &book, unsigned name) {
    float level = name & 127 ? book.levels[name & 127] : 0.0f;
    return name & 128 ? -level : level;
}

DEVICE void load_values(const Book &book, Values &values) {
    for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x))
        values.of[i] = (i & 127) > book.num_levels ? 0.0f : value_of(book, unsigned(i));
    __syncthreads();
}

DEVICE void load_few(const Book &book, Values &values) {
    int i = int(threadIdx.x);
    if (i < 64) reinterpret_cast<float4 *>(values.of)[i] = reinterpret_cast<const float4 *>(book.values)[i];
    __syncthreads();
}

template <bool FEW, bool WIDE>
DEVICE void decode(const DecodeJob &job, unsigned char *shared) {
    Shelf shelf{shared};
    Values *values = shelf.take<Values>(1);
    int marks = (WIDE ? 32 * job.warps : 32) + 2, own = WIDE ? 0 : int(threadIdx.x / 32);
    unsigned *all = shelf.take<unsigned>(marks * (WIDE ? 1 : WARPS));
    int size = job.bucket_size < TILE * job.warps ? job.bucket_size : TILE * job.warps;
    Room room = room_of<WIDE>(shelf, FEW ? FEW_WORDS : (most_bytes(job.book, size) + 3) / 4 + 3, job.warps);
    Group<WIDE> group = group_of<WIDE>(job.warps, room.board);
    if (FEW)
        load_few(job.book, *values);
    else
        load_values(job.book, *values);
    long long bucket = WIDE ? (long long)blockIdx.x : (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (bucket < job.num_buckets) decode_bucket<FEW>(job, bucket, group, room, all + marks * own, *values);
}

KERNEL decode_few(JOB(DecodeJob) job) {
    SHARED_BYTES(shared);
    decode<true, false>(job, shared);
}

ANY_KERNEL decode_any(JOB(DecodeJob) job) {
    SHARED_BYTES(shared);
    decode<false, false>(job, shared);
}

WIDE_KERNEL decode_wide(JOB(DecodeJob) job) {
    SHARED_BYTES(shared);
    decode<false, true>(job, shared);
}

KERNEL norms(JOB(MeasureJob) job) {
    long long bucket = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (bucket < job.num_buckets) norm_bucket(job, bucket, int(threadIdx.x % 32));
}

KERNEL histogram(JOB(MeasureJob) job) {
    SHARED_BYTES(shared);
    unsigned *bins = reinterpret_cast<unsigned *>(shared) + (NUM_BINS + 3) * (threadIdx.x / 32);
    long long bucket = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (bucket < job.num_buckets) histogram_bucket(job, bucket, int(threadIdx.x % 32), bins);
}

KERNEL moments(JOB(MeasureJob) job) {
    long long bucket = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (bucket < job.num_buckets) moments_bucket(job, bucket, int(threadIdx.x % 32));
}
