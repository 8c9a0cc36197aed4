/* The warps that share a bucket, and what they do together. A bucket of at most 1024 coordinates has one warp; a longer
 * one (WIDE) has the whole block, a warp for every 1024.
 *
 * While a bucket is rounded, lane l of warp w has coordinate 1024 w + 512 (l / 16) + 16 t + l % 16 in turn t, that is
 * half of one of the 16 sums that a norm begins with; while bits are laid out, it has chunk 32 w + l, coordinates
 * 32 (32 w + l) to 32 (32 w + l) + 31; and while means are added up, coordinate 1024 w + 32 t + l.
 */
#ifndef QGENX_GPU_GROUP_H
#define QGENX_GPU_GROUP_H

namespace qgenx {

constexpr unsigned ALL = ~0u; /* lanes of a warp */
constexpr int TILE = 1024;    /* coordinates of a warp */
constexpr int MOST_WARPS = 16;
constexpr int ROW = 48; /* bytes between chunks in shared memory: no two lanes meet in a bank */
constexpr int ROWS = 32 * ROW + 32;

/* Where a chunk begins among the bytes of a warp: the second half lies in other banks than the first. */
DEVICE int row_of(int chunk) { return ROW * chunk + 2 * (chunk & 16); }

template <bool WIDE>
struct Group {
    int lane, warp, warps;
    int *board; /* shared: what warps tell one another, MOST_WARPS of it and then a few */

    DEVICE_MEMBER int rounded() const { return (WIDE ? TILE * warp : 0) + 32 * (lane & 16) + (lane & 15); }
    DEVICE_MEMBER int added() const { return (WIDE ? TILE * warp : 0) + lane; }
    DEVICE_MEMBER int chunk() const { return WIDE ? 32 * warp + lane : lane; }
    DEVICE_MEMBER int rank() const { return WIDE ? 32 * warp + lane : lane; }
    DEVICE_MEMBER int size() const { return WIDE ? 32 * warps : 32; }
    DEVICE_MEMBER void sync() const {
        if (WIDE)
            __syncthreads();
        else
            __syncwarp();
    }
    DEVICE_MEMBER bool any(bool own) const { return WIDE ? __syncthreads_or(own) : __ballot_sync(ALL, own) != 0; }

    /* The sum over the lanes before this one, and over all. */
    DEVICE_MEMBER int sum_before(int own, int &total) const {
        int sum = own;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            int other = __shfl_up_sync(ALL, sum, step);
            if (lane >= step) sum += other;
        }
        total = __shfl_sync(ALL, sum, 31);
        if (!WIDE) return sum - own;
        if (lane == 0) board[warp] = total;
        __syncthreads();
        int before = 0;
        total = 0;
#pragma unroll 1
        for (int other = 0; other < warps; other++) {
            before += other < warp ? board[other] : 0;
            total += board[other];
        }
        __syncthreads();
        return before + sum - own;
    }

    /* The largest over the lanes before this one, -1 if there is none, and over all. */
    DEVICE_MEMBER int highest_before(int own, int &highest) const {
        int most = own;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            int other = __shfl_up_sync(ALL, most, step);
            if (lane >= step && other > most) most = other;
        }
        highest = __shfl_sync(ALL, most, 31);
        int before = __shfl_up_sync(ALL, most, 1);
        before = lane ? before : -1;
        if (!WIDE) return before;
        if (lane == 0) board[warp] = highest;
        __syncthreads();
        highest = -1;
#pragma unroll 1
        for (int other = 0; other < warps; other++) {
            if (other < warp && board[other] > before) before = board[other];
            if (board[other] > highest) highest = board[other];
        }
        __syncthreads();
        return before;
    }

    /* What lane 0 of the first warp has. */
    DEVICE_MEMBER int first(int own) const {
        if (!WIDE) return __shfl_sync(ALL, own, 0);
        if (rank() == 0) board[MOST_WARPS] = own;
        __syncthreads();
        int found = board[MOST_WARPS];
        __syncthreads();
        return found;
    }
};

/* The ones are the coordinates of this lane's chunk that the bucket has. */
DEVICE unsigned chunk_mask(int count, int chunk) {
    int left = count - 32 * chunk;
    return left > 31 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
}

/* A lane's chunk of a warp's 1024 bytes. */
DEVICE void read_row(const unsigned char *rows, int lane, unsigned *bytes) {
    const uint4 *row = reinterpret_cast<const uint4 *>(rows + row_of(lane));
    uint4 low = row[0], high = row[1];
    bytes[0] = low.x, bytes[1] = low.y, bytes[2] = low.z, bytes[3] = low.w;
    bytes[4] = high.x, bytes[5] = high.y, bytes[6] = high.z, bytes[7] = high.w;
}

DEVICE void write_row(unsigned char *rows, int lane, const unsigned *bytes) {
    uint4 *row = reinterpret_cast<uint4 *>(rows + row_of(lane));
    row[0] = uint4{bytes[0], bytes[1], bytes[2], bytes[3]};
    row[1] = uint4{bytes[4], bytes[5], bytes[6], bytes[7]};
}

}  // namespace qgenx

#endif
