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

/* How many zeros of a mask lie below each place, bit by bit, of five. */
struct ZerosBelow {
    unsigned bits[5];
};

DEVICE ZerosBelow zeros_below(unsigned mask) {
    ZerosBelow zeros;
    unsigned rises = ~mask << 1; /* places where the bit changes */
#pragma unroll
    for (int bit = 0; bit < 3; bit++) {
        zeros.bits[bit] = odd_prefix(rises);
        rises &= ~zeros.bits[bit];
    }
    /* At most three are left, at the 8th, 16th and 24th zero; a difference of two places has the ones between them. */
    unsigned later = rises & (rises - 1), second = later & (0u - later);
    zeros.bits[3] = 2 * second - rises;
    zeros.bits[4] = 0u - second;
    return zeros;
}

/* The bits of x at the ones of a mask, close together. A bit goes down by the powers of two in the zeros below it, the
 * smallest first. The planes need not move with it: between its place and where it is going the higher powers are the
 * same. */
DEVICE unsigned compress(unsigned x, unsigned mask) {
    ZerosBelow zeros = zeros_below(mask);
    x &= mask;
#pragma unroll
    for (int bit = 0; bit < 5; bit++) x = (x & ~zeros.bits[bit]) | (x & zeros.bits[bit]) >> (1 << bit);
    return x;
}

/* The way back. */
DEVICE unsigned expand(unsigned x, unsigned mask) {
    ZerosBelow zeros = zeros_below(mask);
#pragma unroll
    for (int bit = 4; bit >= 0; bit--) x = (x & ~zeros.bits[bit]) | (x << (1 << bit) & zeros.bits[bit]);
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

/* The same without asking whether there are any, which is cheaper where there mostly are. */
DEVICE void put_all(unsigned *words, int at, unsigned bits) {
    atomicOr(words + (at >> 5), bits << (at & 31));
    atomicOr(words + (at >> 5) + 1, __funnelshift_l(bits, 0, at & 31));
}

/* 32 bits from a place on. */
DEVICE unsigned peek(const unsigned *words, int at) {
    return __funnelshift_r(words[at >> 5], words[(at >> 5) + 1], at & 31);
}

}  // namespace qgenx

#endif
