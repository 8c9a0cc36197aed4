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
    if (!read_words<16>(book, words, at, end, alive, !book.runs, group, planes)) return false;
    return is_end(words, at, end) && names_of(book, planes, alive, group, names);
}

/* A payload's bucket to the rows, as names; false if its bytes are no code. */
template <bool WIDE>
DEVICE bool read_bucket(const DecodeJob &job, long long source, int count, const Group<WIDE> &group, const Room &room,
                        unsigned *marks) {
    int size = job.lengths[source], code_words = (most_bytes(job.book, count) + 3) / 4 + 3;
    long long begin = job.ends[source] - size;
    if (size > most_bytes(job.book, count)) return false;
    load_code(job, begin, size, code_words, group, room.code);
    int start = int(begin & 3) * 8;
    unsigned bytes[8];
    if (!read_any(job.book, room.code, start, start + 8 * size, count, group, marks, bytes)) return false;
    group.sync(); /* rows may lie where the code was */
    write_row(room.rows + ROWS * (WIDE ? group.warp : 0), group.lane, bytes);
    group.sync();
    return true;
}

/* The bytes of a bucket of few levels, 16 at once; what lies behind them is never looked at, since `read_few_words`
 * knows where they end. The data is long enough for whole sixteens. */
DEVICE void load_code_few(const DecodeJob &job, long long begin, int size, int lane, unsigned *words) {
    const uint4 *from = reinterpret_cast<const uint4 *>(job.data) + (begin >> 4);
    int needed = (int(begin & 15) + size + 15) / 16;
#pragma unroll
    for (int place = 0; place < 96; place += 32)
        if (place + lane < needed) reinterpret_cast<uint4 *>(words)[place + lane] = from[place + lane];
    __syncwarp();
}

/* The same as words. */
DEVICE bool read_bucket_few(const DecodeJob &job, long long source, int count, const Group<false> &group,
                            const Room &room) {
    const Book &book = job.book;
    int size = job.lengths[source];
    long long begin = job.ends[source] - size;
    if (8 * size > count * book.depth + 7) return false;
    load_code_few(job, begin, size, group.lane, room.code);
    unsigned planes[8], bytes[8];
    int start = int(begin & 15) * 8;
    if (!read_few_words(book, room.code, start, start + 8 * size, count, group, planes)) return false;
    bytes_of(planes, bytes);
    write_row(room.rows, group.lane, bytes);
    __syncwarp();
    return true;
}

/* Adds the levels of the names, or words, in a warp's rows, times the norm; or the norm alone where there is no code: all
 * values are 0 then, or all NaN. Of words of up to five bits each lane keeps one product. */
template <bool FEW>
DEVICE void add_rows(const Book &book, const Values &values, float norm, bool coded, const unsigned char *rows,
                     int lane, float *sums) {
    if (FEW && book.depth <= 5) {
        float product = coded ? __fmul_rn(values.of[lane], norm) : norm; /* then it is the same whatever the word */
#pragma unroll
        for (int t = 0; t < 32; t++) sums[t] = __fadd_rn(sums[t], __shfl_sync(ALL, product, rows[row_of(t) + lane]));
        return;
    }
#pragma unroll
    for (int t = 0; t < 32 && !coded; t++) sums[t] = __fadd_rn(sums[t], norm);
#pragma unroll
    for (int t = 0; t < 32 && coded; t++)
        sums[t] = __fadd_rn(sums[t], __fmul_rn(values.of[rows[row_of(t) + lane]], norm));
}

/* A sum's mean, times a factor. The product with an odd number's inverse in float64 rounds to the quotient in float32:
 * no quotient by an odd number lies in the middle of two of these, and each is farther from there than the product is
 * from it. By a power of two the product is exact. */
DEVICE float finished(const DecodeJob &job, float sum) {
    float mean = job.inverse > 0.0 ? __double2float_rn(__dmul_rn(sum, job.inverse)) : __fdiv_rn(sum, job.divisor);
    return __fmul_rn(mean, job.factor);
}

/* Coordinates of a target, zeros behind. */
template <bool WIDE>
DEVICE void load_sums(const float *out, int count, const Group<WIDE> &group, float *sums) {
#pragma unroll
    for (int t = 0; t < 32; t++) sums[t] = group.added() + 32 * t < count ? out[group.added() + 32 * t] : 0.0f;
}

template <bool WIDE>
DEVICE void store_sums(const DecodeJob &job, const float *sums, int count, bool finish, const Group<WIDE> &group,
                       float *out) {
    int left = count - group.added();
    out += group.added();
#pragma unroll
    for (int t = 0; t < 32; t++)
        if (32 * t < left) out[32 * t] = finish ? finished(job, sums[t]) : sums[t];
}

template <bool FEW, bool WIDE>
DEVICE void decode_bucket(const DecodeJob &job, long long bucket, const Group<WIDE> &group, const Room &room,
                          unsigned *marks, const Values &values) {
    const Book &book = job.book;
    Bucket place = job.buckets[bucket];
    int todo = job.todo[place.segment];
    float *out = job.segments[place.segment] + place.offset, sums[32];
    if (todo & ADD)
        load_sums(out, place.count, group, sums);
    else
#pragma unroll
        for (int t = 0; t < 32; t++) sums[t] = 0.0f;
    bool found = false;
#pragma unroll 1
    for (int payload = 0; payload < job.num_payloads; payload++) {
        long long source = job.sources[(long long)payload * job.num_segments + place.segment];
        if (source < 0) continue;
        found = true;
        source += place.number;
        float norm = job.norms[source];
        bool coded = has_code(norm), good = true;
        if (!coded)
            good = job.lengths[source] == 0;
        else if constexpr (FEW)
            good = read_bucket_few(job, source, place.count, group, room);
        else
            good = read_bucket(job, source, place.count, group, room, marks);
        if (!good) {
            if (group.rank() == 0) *job.wrong = 1;
            return;
        }
        add_rows<FEW>(book, values, norm, coded, room.rows + ROWS * (WIDE ? group.warp : 0), group.lane, sums);
        group.sync();
    }
    if (found) store_sums(job, sums, place.count, todo & FINISH, group, out);
}

}  // namespace qgenx

#endif
