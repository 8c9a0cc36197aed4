/* Bits of 32 coordinates in a word: one lane has a chunk, as a mask for each depth of the code. */
#ifndef QGENX_GPU_BITS_H
#define QGENX_GPU_BITS_H

namespace qgenx {

DEVICE unsigned odd_prefix(unsigned zeros) {
    zeros ^= zeros << 1;
    zeros ^= zeros << 2;
    zeros ^= zeros << 4;
    zeros ^= zeros << 8;
    return zeros ^ zeros << 16;
}

/* The bits of x at the ones of a mask, close together (Hacker's Delight, 7-4). */
DEVICE unsigned compress(unsigned x, unsigned mask) {
    x &= mask;
    unsigned zeros = ~mask << 1;
#pragma unroll
    for (int step = 0; step < 5; step++) {
        unsigned odd = odd_prefix(zeros), move = odd & mask, moved = x & move;
        mask = (mask ^ move) | move >> (1 << step);
        x = (x ^ moved) | moved >> (1 << step);
        zeros &= ~odd;
    }
    return x;
}

/* The way back. */
DEVICE unsigned expand(unsigned x, unsigned mask) {
    unsigned moves[5], left = mask, zeros = ~mask << 1;
#pragma unroll
    for (int step = 0; step < 5; step++) {
        unsigned odd = odd_prefix(zeros);
        moves[step] = odd & left;
        left = (left ^ moves[step]) | moves[step] >> (1 << step);
        zeros &= ~odd;
    }
#pragma unroll
    for (int step = 4; step >= 0; step--) x = (x & ~moves[step]) | (x << (1 << step) & moves[step]);
    return x & mask;
}

template <int SHIFT>
DEVICE unsigned swap_bits(unsigned x, unsigned places) {
    unsigned change = (x ^ x >> SHIFT) & places;
    return x ^ change ^ change << SHIFT;
}

/* Bit i of byte j becomes bit j of byte i, of eight bytes, the first four in x. Its own inverse. */
DEVICE void transpose(unsigned &x, unsigned &y) {
    x = swap_bits<14>(swap_bits<7>(x, 0x00AA00AAu), 0x0000CCCCu);
    y = swap_bits<14>(swap_bits<7>(y, 0x00AA00AAu), 0x0000CCCCu);
    unsigned change = (x >> 4 ^ y) & 0x0F0F0F0Fu;
    y ^= change;
    x ^= change << 4;
}

/* Four rows of four bytes become columns. */
DEVICE void transpose_bytes(unsigned *row) {
    unsigned a = __byte_perm(row[0], row[1], 0x5140), b = __byte_perm(row[0], row[1], 0x7362);
    unsigned c = __byte_perm(row[2], row[3], 0x5140), d = __byte_perm(row[2], row[3], 0x7362);
    row[0] = __byte_perm(a, c, 0x5410);
    row[1] = __byte_perm(a, c, 0x7632);
    row[2] = __byte_perm(b, d, 0x5410);
    row[3] = __byte_perm(b, d, 0x7632);
}

/* Eight planes from 32 bytes: plane d holds bit d of every byte. */
DEVICE void planes_of(const unsigned *bytes, unsigned *planes) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        planes[q] = bytes[2 * q];
        planes[4 + q] = bytes[2 * q + 1];
        transpose(planes[q], planes[4 + q]);
    }
    transpose_bytes(planes);
    transpose_bytes(planes + 4);
}

/* The way back. */
DEVICE void bytes_of(unsigned *planes, unsigned *bytes) {
    transpose_bytes(planes);
    transpose_bytes(planes + 4);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        transpose(planes[q], planes[4 + q]);
        bytes[2 * q] = planes[q];
        bytes[2 * q + 1] = planes[4 + q];
    }
}

/* Which elements' first d + 1 bits, the first highest, are no less than a number: from the last bit to the first the
 * majority of the bit, of the result so far and of the complement of the number's bit. */
template <int PLANES>
DEVICE unsigned no_less(const unsigned *planes, unsigned number, int d) {
    unsigned result = ~0u;
#pragma unroll
    for (int j = PLANES - 1; j >= 0; j--) {
        if (j > d) continue;
        unsigned below = (number >> (d - j) & 1) - 1;
        result = (planes[j] & (result | below)) | (result & below);
    }
    return number >> (d + 1) ? 0 : result;
}

/* Up to 32 bits at a place among the words of shared memory, which were zeros. */
DEVICE void put(unsigned *words, int at, unsigned bits) {
    unsigned high = bits >> 1 >> (31 - (at & 31));
    if (bits) atomicOr(words + (at >> 5), bits << (at & 31));
    if (high) atomicOr(words + (at >> 5) + 1, high);
}

/* 32 bits from a place on. */
DEVICE unsigned peek(const unsigned *words, int at) {
    return __funnelshift_r(words[at >> 5], words[(at >> 5) + 1], at & 31);
}

}  // namespace qgenx

#endif
