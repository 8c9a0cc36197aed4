/* What a kernel is told. Python has the same structures, in the same order, in hvd_qgenx/backends/cuda/jobs.py. */
#ifndef QGENX_GPU_JOBS_H
#define QGENX_GPU_JOBS_H

namespace qgenx {

constexpr int MOST_LEVELS = 127, MOST_DEPTH = 15, MOST_INTERVALS = 8;

/* Bins of few levels: the highest bits of u + BIN_START, which rise with u; 32 to the octave above BIN_START. */
constexpr float BIN_START = 0x1p-12f;
constexpr int BIN_SHIFT = 18, FIRST_BIN = (127 - 12) << 5, NUM_FEW_BINS = 400;

/* Levels and words. A symbol is named by its index, and bit 7 of the name if it is negative. */
struct Book {
    const unsigned char *symbols; /* of each word of `depth` bits, first bit lowest, zeros behind shorter ones */
    const float *values;          /* few levels: of each word as a byte, zeros behind */
    const unsigned char *bins;    /* few levels: how many of l_1 to l_(s-1) lie in lower bins, NUM_FEW_BINS */
    float levels[MOST_LEVELS + 1];
    float gaps[MOST_LEVELS + 1]; /* 1 / (l_{j+1} - l_j) */
    int num_levels;              /* s */
    int uniform;                 /* whether l_j = float32(j / s) */
    int draw_bits;               /* 31, or as many as leave room for s of evenly spaced levels */
    int width;                   /* of the fixed code, else 0 */
    int depth, shortest;         /* bits of the longest word and of the shortest */
    int runs, ones;              /* how runs of zeros are coded, 0 none, 1 Rice, 2 omega; and whether ones' are too */
    /* Few levels: a word of more than d + 1 bits has a first d + 1 that are no less than a limit, as a number. `below` has
     * ones for each bit of it that is zero, and `more` has ones unless there is no such word. */
    unsigned more[8], below[8][8];
    int num_intervals[MOST_DEPTH + 1];
    int intervals[MOST_DEPTH + 1][MOST_INTERVALS][2]; /* of the first d bits of words that have more: from, and up to */
    unsigned short words[256];                        /* of each symbol's name, first bit lowest */
};

/* A bucket: its place in the vector, which the draws go by, and where it lies. */
struct Bucket {
    long long position;
    long long offset; /* in its segment */
    int segment, count;
    int number, unused; /* in its segment */
};

struct EncodeJob {
    Book book;
    const Bucket *buckets;
    const float *const *segments;
    long long num_buckets;
    float *norms;
    unsigned short *lengths;    /* in bytes */
    unsigned *codes;            /* `stride` words for each bucket, a multiple of four */
    double *sums;               /* two for each bucket: of (decoded - v)^2 and of v^2 */
    unsigned long long *counts; /* [COPIES][128], how often each index was drawn */
    unsigned key[2];
    int stride;
    int linf;        /* the norm is the largest magnitude */
    int norms_known; /* a second pass, after a norm was found that is not finite */
    int warps;       /* that share a bucket */
};

struct GatherJob {
    const unsigned *codes;
    const long long *ends; /* of each bucket's bytes in `out` */
    const unsigned short *lengths;
    unsigned char *out;
    long long num_buckets;
    int stride;
};

/* What is to be done with a segment's sum. */
enum { ADD = 1, FINISH = 2 };

struct DecodeJob {
    Book book;
    const Bucket *buckets; /* of the target */
    float *const *segments;
    long long num_buckets;
    const unsigned *data; /* the bytes of all payloads' codes */
    long long num_words;
    const long long *ends; /* of each source bucket's bytes there */
    const unsigned short *lengths;
    const float *norms;        /* of each source bucket */
    const long long *sources;  /* [payload][segment]: its first source bucket, -1 if there is none */
    const unsigned char *todo; /* of each segment */
    int *wrong;
    int num_payloads, num_segments, bucket_size;
    float divisor, factor;
    double inverse; /* of the divisor, or 0: see `finished` */
    int warps;
};

struct MeasureJob {
    const Bucket *buckets;
    const float *const *segments;
    long long num_buckets;
    float *norms;
    const unsigned *weights;
    long long *weighted, *plain; /* histograms: [COPIES][513], moments: [COPIES][3] */
    int linf;
};

constexpr int COPIES = 64; /* of counters, so that blocks do not wait for one another */
constexpr int NUM_BINS = 513;

}  // namespace qgenx

#endif
