/* Encoding one bucket. */
#ifndef QGENX_GPU_ENCODE_H
#define QGENX_GPU_ENCODE_H

#include "few.h"
#include "runs.h"

namespace qgenx {

/* Shared memory of a block, beside each group's. */
struct Tables {
    float levels[MOST_LEVELS + 1], gaps[MOST_LEVELS + 1];
    Level pairs[8];                   /* of few levels */
    unsigned char bins[NUM_FEW_BINS]; /* the same */
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

/* What a lane's symbol is under a norm. */
DEVICE Symbol symbol_of(const Book &book, const Tables &tables, float norm, int lane) {
    int index = lane >> 1 & 7, name = index | (lane & 1) << 7;
    return Symbol{__fmul_rn(tables.levels[index], norm), unsigned(book.words[name]) << 24 | 1u << 3 * index};
}

/* Rounds a bucket's coordinates by the tables of few levels. */
template <Search SEARCH>
DEVICE void round_tile(const Rounding &r, float *v, int count, const Tables &tables, unsigned *counts,
                       const Group<false> &group, unsigned char *rows) {
    /* What is behind the bucket will be counted as zeros. */
    if (group.lane == 0) atomicAdd(counts + index_of_zero(r), unsigned(count - TILE));
    Symbol symbol = symbol_of(r.book, tables, r.norm, group.lane);
    bool has_next = group.lane + 1 < r.book.num_levels;
    unsigned next = has_next ? __float_as_uint(tables.levels[group.lane + 1]) : 0x7F800000u;
    FewTables few{tables.pairs, tables.bins, next - 1};
    Counts own;
    if (is_plain(r.norm))
        round_few<SEARCH, true>(r, v, few, symbol, group.lane, own, rows);
    else
        round_few<SEARCH, false>(r, v, few, symbol, group.lane, own, rows);
    count_few(own, group.lane, counts);
}

/* Rounds a group's coordinates; their names go to the rows, and v becomes what rounding adds to magnitudes. */
template <bool WIDE>
DEVICE void round_any(const Rounding &r, float *v, int count, const Tables &tables, unsigned *counts,
                      const Group<WIDE> &group, unsigned char *rows) {
    int left = count - group.rounded();
    bool small = r.norm < SMALL_NORM;
    unsigned char *own = rows + row_of(group.lane & 16) + (group.lane & 15);
#pragma unroll
    for (int t = 0; t < 32; t += 2) {
        unsigned draws[2];
        draw_two(r, t, draws[0], draws[1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float value = v[t + i];
            unsigned index = index_of(value, r, draws[i], small);
            own[ROW * (t / 2) + 16 * i] = (unsigned char)(index | unsigned(value < 0.0f) << 7);
            if (16 * (t + i) < left) atomicAdd(counts + index, 1u);
            v[t + i] = __fsub_rn(__fmul_rn(tables.levels[index], r.norm), fabsf(value));
        }
    }
}

/* A group's coordinates, zeros behind. */
template <bool WIDE>
DEVICE void load_tile(const float *values, int count, const Group<WIDE> &group, float *v) {
    const float *own = values + group.rounded();
    int left = count - group.rounded();
#pragma unroll
    for (int t = 0; t < 32; t++) v[t] = 16 * t < left ? own[16 * t] : 0.0f;
}

/* The norm of a bucket, and its sum of squares. */
template <bool WIDE>
DEVICE float norm_of(const EncodeJob &job, long long bucket, const float *v, const Group<WIDE> &group, double *carry,
                     double &squares) {
    squares = squares_of<true>(v, group, carry);
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
    return write_words<16>(book, planes, alive, cursor, !book.runs, group, words);
}

/* What a bucket's kernel tells beside its code, as soon as it knows, so that no register keeps it. */
DEVICE void report(const EncodeJob &job, long long bucket, float norm, double squares) {
    job.norms[bucket] = norm;
    job.sums[2 * bucket] = 0.0;
    job.sums[2 * bucket + 1] = squares;
}

/* A bucket's code in shared memory, from what its group has put into the rows; how many bits it has. */
template <bool WIDE>
DEVICE int write_bucket(const EncodeJob &job, int count, const Group<WIDE> &group, const Room &room,
                        const Tables &tables) {
    unsigned bytes[8];
    read_row(room.rows + ROWS * (WIDE ? group.warp : 0), group.lane, bytes);
    group.sync(); /* the code may lie where the rows were */
    for (int word = group.rank(); word < job.stride + 2; word += group.size()) room.code[word] = 0;
    group.sync();
    return write_any(job.book, tables, bytes, count, group, room.code);
}

/* Four words at once, of as many as shared memory has for few levels. */
DEVICE void clear_few(uint4 *code, int lane) {
#pragma unroll
    for (int place = 0; place <= FEW_WORDS / 4; place += 32)
        if (place + lane <= FEW_WORDS / 4) code[place + lane] = uint4{0, 0, 0, 0};
}

DEVICE void copy_few(uint4 *to, const uint4 *from, int count, int lane) {
#pragma unroll
    for (int place = 0; place < FEW_WORDS / 4; place += 32)
        if (place + lane < count) to[place + lane] = from[place + lane];
}

DEVICE int write_bucket_few(const EncodeJob &job, int count, const Group<false> &group, const Room &room) {
    unsigned bytes[8], planes[8];
    read_few_row(room.rows, group.lane, bytes);
    planes_of(bytes, planes);
    return write_few_words(job.book, planes, count, group, room.code);
}

template <Search SEARCH, bool WIDE>
DEVICE void encode_bucket(const EncodeJob &job, unsigned number, const Group<WIDE> &group, const Room &room,
                          const Tables &tables, unsigned *counts) {
    long long bucket = number; /* a wide one would keep a register more, and there are none */
    Bucket place = job.buckets[bucket];
    float v[32];
    load_tile(job.segments[place.segment] + place.offset, place.count, group, v);
    double squares;
    float norm = norm_of(job, bucket, v, group, room.carry, squares);
    if (!has_code(norm)) {
        if (group.rank() == 0) report(job, bucket, norm, 0.0), job.lengths[bucket] = 0;
        return;
    }
    if (group.rank() == 0) report(job, bucket, norm, squares);
    Rounding r{job.book, tables.levels, tables.gaps, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0, 0, 0};
    set_norm(r, norm);
    set_counter(r, job.key, place.position, group);
    unsigned char *rows = room.rows + ROWS * (WIDE ? group.warp : 0);
    if constexpr (SEARCH == Search::ANY) {
        round_any(r, v, place.count, tables, counts, group, rows);
    } else {
        round_tile<SEARCH>(r, v, place.count, tables, counts, group, rows);
        clear_few(reinterpret_cast<uint4 *>(room.code), group.lane);
    }
    double error = squares_of<false>(v, group, room.carry);
    if (group.rank() == 0) job.sums[2 * bucket] = error;
    group.sync();
    unsigned *code = job.codes + bucket * job.stride;
    int bits;
    if constexpr (SEARCH == Search::ANY)
        bits = write_bucket(job, place.count, group, room, tables);
    else
        bits = write_bucket_few(job, place.count, group, room);
    group.sync();
    if (group.rank() == 0) job.lengths[bucket] = (unsigned short)((bits + 7) / 8);
    if constexpr (SEARCH == Search::ANY)
        for (int word = group.rank(); word < (bits + 31) / 32; word += group.size()) code[word] = room.code[word];
    else
        copy_few(reinterpret_cast<uint4 *>(code), reinterpret_cast<uint4 *>(room.code), (bits + 127) / 128, group.lane);
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
