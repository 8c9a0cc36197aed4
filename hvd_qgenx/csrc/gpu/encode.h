/* Encoding one bucket. */
#ifndef QGENX_GPU_ENCODE_H
#define QGENX_GPU_ENCODE_H

#include "rounding.h"
#include "runs.h"

namespace qgenx {

/* Shared memory of a block, beside each group's. */
struct Tables {
    float levels[MOST_LEVELS + 1], gaps[MOST_LEVELS + 1];
    unsigned short words[256];
    unsigned counts[MOST_LEVELS + 1];
};

/* Words of shared memory that a bucket's code takes at most, and what is written or read behind it. */
constexpr int FEW_WORDS = TILE * 8 / 32 + 2;

/* Of a group: `rows` of bytes for its warps, and its code. Where buckets are long these share memory. */
struct Room {
    unsigned char *rows;
    unsigned *code;
    int *board;
    double *carry;
};

/* A symbol's name; of few levels index + 8 [v < 0]. */
template <Search SEARCH>
DEVICE unsigned name_of(unsigned index, float v) {
    return index + (__float_as_uint(v) >> 31 << (SEARCH == Search::ANY ? 7 : 3));
}

/* How often each index was drawn, up to eight of them, a byte each: a lane has 32 coordinates. */
struct Counts {
    unsigned long long bytes = 0;
    DEVICE_MEMBER void add(unsigned index) { bytes += 1ull << 8 * index; }
};

/* What this lane has drawn is added to the block's counters, each pair of neighbouring lanes in one turn. */
DEVICE void count_few(const Counts &own, int lane, unsigned *counts) {
    unsigned long long mask = 0x00FF00FF00FF00FFull, even = own.bytes & mask, odd = own.bytes >> 8 & mask;
#pragma unroll
    for (int half = 16; half; half >>= 1) {
        even += __shfl_xor_sync(ALL, even, half);
        odd += __shfl_xor_sync(ALL, odd, half);
    }
    if (lane < 8) atomicAdd(counts + lane, unsigned((lane & 1 ? odd : even) >> 16 * (lane >> 1) & 0xFFFF));
}

DEVICE float with_sign_of(float value, float magnitude) {
    return __uint_as_float((__float_as_uint(value) & 0x80000000u) | __float_as_uint(magnitude));
}

/* Rounds a group's coordinates; their names, or words, go to the rows, and v becomes what rounding adds to it. */
template <Search SEARCH, bool SMALL, bool WIDE>
DEVICE void round_tile(const Rounding &r, float *v, int count, const Tables &tables, unsigned *counts,
                       const Group<WIDE> &group, unsigned char *rows) {
    Counts few;
    int left = count - (WIDE ? TILE * group.warp : 0) - group.lane;
#pragma unroll
    for (int t = 0; t < 32; t += 2) {
        unsigned draws[2];
        draw_two(r, t, group.lane, draws[0], draws[1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float value = v[t + i];
            unsigned index = index_of<SEARCH, SMALL>(value, r, draws[i]), name = name_of<SEARCH>(index, value);
            rows[ROW * (t + i) + group.lane] = SEARCH == Search::ANY ? name : tables.words[name];
            if (SEARCH != Search::ANY)
                few.add(index);
            else if (32 * (t + i) < left)
                atomicAdd(counts + index, 1u);
            float decoded = __fmul_rn(tables.levels[index], r.norm);
            v[t + i] = __fsub_rn(with_sign_of(value, decoded), value);
        }
    }
    if (SEARCH == Search::ANY) return;
    count_few(few, group.lane, counts);
    if (group.lane == 0) atomicAdd(counts, unsigned(count - TILE)); /* what is behind the bucket was counted as zeros */
}

/* A group's coordinates, zeros behind. */
template <bool WIDE>
DEVICE void load_tile(const float *values, int count, const Group<WIDE> &group, float *v) {
    int first = (WIDE ? TILE * group.warp : 0) + group.lane;
#pragma unroll
    for (int t = 0; t < 32; t++) v[t] = first + 32 * t < count ? values[first + 32 * t] : 0.0f;
}

/* The norm of a bucket, and its sum of squares. */
template <bool WIDE>
DEVICE float norm_of(const EncodeJob &job, long long bucket, const float *v, const Group<WIDE> &group, double *carry,
                     double &squares) {
    squares = squares_of(v, group, carry);
    if (job.norms_known) return job.norms[bucket];
    return job.linf ? largest_of(v, group) : root_of(squares);
}

/* Bits of a bucket's code, which is put into zeros. */
template <bool WIDE>
DEVICE int write_any(const Book &book, const Tables &tables, const unsigned *names, int count, const Group<WIDE> &group,
                     unsigned *words) {
    if (book.width) return write_fixed(book, names, count, group, words);
    unsigned alive = chunk_mask(count, group.chunk()), planes[16], low[8], high[8];
    int cursor = book.runs ? write_runs(book, names, alive, group, words) : 0;
#pragma unroll
    for (int q = 0; q < 8; q++) {
        low[q] = high[q] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned word = tables.words[byte_of(names, 4 * q + i)];
            low[q] |= (word & 255) << 8 * i;
            high[q] |= word >> 8 << 8 * i;
        }
    }
    planes_of(low, planes);
    planes_of(high, planes + 8);
    return write_words<false, 16>(book, planes, alive, cursor, !book.runs, group, words);
}

template <bool WIDE>
DEVICE int write_few(const Book &book, const unsigned *bytes, int count, const Group<WIDE> &group, unsigned *words) {
    unsigned planes[8];
    planes_of(bytes, planes);
    return write_words<true, 8>(book, planes, chunk_mask(count, group.chunk()), 0, true, group, words);
}

/* What a bucket's kernel tells beside its code. */
DEVICE void report(const EncodeJob &job, long long bucket, float norm, double error, double squares) {
    job.norms[bucket] = norm;
    job.sums[2 * bucket] = error;
    job.sums[2 * bucket + 1] = squares;
}

/* A bucket's bits, from what its group has put into the rows. */
template <Search SEARCH, bool WIDE>
DEVICE int write_bucket(const EncodeJob &job, int count, const Group<WIDE> &group, const Room &room,
                        const Tables &tables) {
    unsigned bytes[8];
    read_row(room.rows + 32 * ROW * (WIDE ? group.warp : 0), group.lane, bytes);
    group.sync(); /* the code may lie where the rows were */
    for (int word = group.rank(); word < job.stride + 2; word += group.size()) room.code[word] = 0;
    group.sync();
    return SEARCH == Search::ANY ? write_any(job.book, tables, bytes, count, group, room.code)
                                 : write_few(job.book, bytes, count, group, room.code);
}

template <Search SEARCH, bool WIDE>
DEVICE void encode_bucket(const EncodeJob &job, long long bucket, const Group<WIDE> &group, const Room &room,
                          const Tables &tables, unsigned *counts) {
    Bucket place = job.buckets[bucket];
    float v[32];
    load_tile(job.segments[place.segment] + place.offset, place.count, group, v);
    double squares;
    float norm = norm_of(job, bucket, v, group, room.carry, squares);
    if (!has_code(norm)) {
        if (group.rank() == 0) report(job, bucket, norm, 0.0, 0.0), job.lengths[bucket] = 0;
        return;
    }
    Rounding r{job.book, tables.levels, tables.gaps, 0.0f, 0.0f, 0.0f, 0, 0, 0};
    set_norm(r, norm);
    set_counter(r, job.key, place.position, group);
    unsigned char *rows = room.rows + 32 * ROW * (WIDE ? group.warp : 0);
    if (norm < SMALL_NORM)
        round_tile<SEARCH, true>(r, v, place.count, tables, counts, group, rows);
    else
        round_tile<SEARCH, false>(r, v, place.count, tables, counts, group, rows);
    double error = squares_of(v, group, room.carry);
    if (group.rank() == 0) report(job, bucket, norm, error, squares);
    group.sync();
    int bits = write_bucket<SEARCH>(job, place.count, group, room, tables);
    group.sync();
    if (group.rank() == 0) job.lengths[bucket] = (unsigned short)((bits + 7) / 8);
    for (int word = group.rank(); word < (bits + 31) / 32; word += group.size())
        job.codes[bucket * job.stride + word] = room.code[word];
    group.sync();
}

/* Moves a bucket's bytes to their place. */
DEVICE void gather_bucket(const GatherJob &job, long long bucket, int lane) {
    int size = job.lengths[bucket];
    const unsigned char *from = reinterpret_cast<const unsigned char *>(job.codes + bucket * job.stride);
    unsigned char *to = job.out + (job.ends[bucket] - size);
    for (int i = lane; i < size; i += 32) to[i] = from[i];
}

}  // namespace qgenx

#endif
