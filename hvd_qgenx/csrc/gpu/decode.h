/* Decoding one bucket of every payload, and adding them up in their order. */
#ifndef QGENX_GPU_DECODE_H
#define QGENX_GPU_DECODE_H

#include "encode.h"

namespace qgenx {

/* Levels with their signs, by symbols' names, or by words where these have a byte. */
struct Values {
    float of[256];
};

/* A bucket's bytes to shared memory, from the word on in which they begin; what lies outside the data is zeros. */
template <bool WIDE>
DEVICE void load_code(const DecodeJob &job, long long begin, int size, int room, const Group<WIDE> &group,
                      unsigned *words) {
    long long first = begin >> 2;
    int needed = int(((begin & 3) + size + 3) >> 2), last = int(((begin & 3) + size) & 3);
    for (int word = group.rank(); word < room; word += group.size()) {
        unsigned bits = word < needed && first + word < job.num_words ? job.data[first + word] : 0;
        /* the next bucket's bytes must not be taken for this one's */
        words[word] = word == needed - 1 && last ? bits & ((1u << 8 * last) - 1) : bits;
    }
    group.sync();
}

/* The most bytes that the code of n symbols takes: what shared memory has room for. */
DEVICE int most_bytes(const Book &book, int n) {
    if (book.width) return (n * book.width + 7) / 8;
    int stages = book.runs ? 1 + book.ones : 0;
    return (n * (book.depth + 2 * stages) + 24 * stages + 7) / 8;
}

/* Names of this lane's chunk from its words' planes; false if a word does not exist. */
template <bool WIDE>
DEVICE bool names_of(const Book &book, unsigned *planes, unsigned alive, const Group<WIDE> &group, unsigned *names) {
    unsigned low[8], high[8];
    bytes_of(planes, low);
    bytes_of(planes + 8, high);
    bool good = true;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        if (!(alive >> i & 1)) continue;
        unsigned name = book.symbols[byte_of(low, i) | byte_of(high, i) << 8];
        good = good && name != 128; /* minus zero: no symbol has this word */
        names[i / 4] |= name << 8 * (i % 4);
    }
    return !group.any(!good);
}

template <bool WIDE>
DEVICE bool read_any(const Book &book, const unsigned *words, int at, int end, int count, const Group<WIDE> &group,
                     unsigned *marks, unsigned *names) {
    unsigned alive = chunk_mask(count, group.chunk()), planes[16];
#pragma unroll
    for (int q = 0; q < 8; q++) names[q] = 0;
    if (book.width) return read_fixed(book, words, at, count, group, names) && is_end(words, at, end);
    if (book.runs && !read_runs(book, words, at, end, alive, group, marks, names)) return false;
    if (!read_words<false, 16>(book, words, at, end, alive, !book.runs, group, planes)) return false;
    return is_end(words, at, end) && names_of(book, planes, alive, group, names);
}

template <bool WIDE>
DEVICE bool read_few(const Book &book, const unsigned *words, int at, int end, int count, const Group<WIDE> &group,
                     unsigned *bytes) {
    unsigned planes[8], alive = chunk_mask(count, group.chunk());
    if (!read_words<true, 8>(book, words, at, end, alive, true, group, planes)) return false;
    bytes_of(planes, bytes);
    return is_end(words, at, end);
}

/* A payload's bucket to the rows, as names or as words; false if its bytes are no code. */
template <bool FEW, bool WIDE>
DEVICE bool read_bucket(const DecodeJob &job, long long source, int count, const Group<WIDE> &group, const Room &room,
                        unsigned *marks) {
    int size = job.lengths[source], code_words = (most_bytes(job.book, count) + 3) / 4 + 3;
    long long begin = job.ends[source] - size;
    if (size > most_bytes(job.book, count)) return false;
    load_code(job, begin, size, code_words, group, room.code);
    int start = int(begin & 3) * 8;
    unsigned bytes[8];
    bool good = FEW ? read_few(job.book, room.code, start, start + 8 * size, count, group, bytes)
                    : read_any(job.book, room.code, start, start + 8 * size, count, group, marks, bytes);
    if (!good) return false;
    group.sync(); /* rows may lie where the code was */
    write_row(room.rows + 32 * ROW * (WIDE ? group.warp : 0), group.lane, bytes);
    group.sync();
    return true;
}

DEVICE float finished(const DecodeJob &job, float sum) { return __fmul_rn(__fdiv_rn(sum, job.divisor), job.factor); }

template <bool FEW, bool WIDE>
DEVICE void decode_bucket(const DecodeJob &job, long long bucket, const Group<WIDE> &group, const Room &room,
                          unsigned *marks, const Values &values) {
    Bucket place = job.buckets[bucket];
    int todo = job.todo[place.segment], first = (WIDE ? TILE * group.warp : 0) + group.lane;
    float *out = job.segments[place.segment] + place.offset, sums[32];
    if (todo & ADD)
        load_tile(out, place.count, group, sums);
    else
#pragma unroll
        for (int t = 0; t < 32; t++) sums[t] = 0.0f;
    bool found = false;
#pragma unroll 1
    for (int payload = 0; payload < job.num_payloads; payload++) {
        long long source = job.sources[(long long)payload * job.num_segments + place.segment];
        if (source < 0) continue;
        found = true;
        source += place.offset / job.bucket_size;
        float norm = job.norms[source];
        bool coded = has_code(norm);
        if (coded ? !read_bucket<FEW>(job, source, place.count, group, room, marks) : job.lengths[source] != 0) {
            if (group.rank() == 0) *job.wrong = 1;
            return;
        }
        if (!coded) { /* all values are 0, or all NaN */
#pragma unroll
            for (int t = 0; t < 32; t++) sums[t] = __fadd_rn(sums[t], norm);
            continue;
        }
        const unsigned char *rows = room.rows + 32 * ROW * (WIDE ? group.warp : 0);
#pragma unroll
        for (int t = 0; t < 32; t++)
            sums[t] = __fadd_rn(sums[t], __fmul_rn(values.of[rows[ROW * t + group.lane]], norm));
        group.sync();
    }
    if (!found) return;
#pragma unroll
    for (int t = 0; t < 32; t++)
        if (first + 32 * t < place.count) out[first + 32 * t] = todo & FINISH ? finished(job, sums[t]) : sums[t];
}

}  // namespace qgenx

#endif
