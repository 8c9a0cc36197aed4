/* CRC-32C, and that of two pieces from those of each. */
#ifndef QGENX_CHECKSUM_H
#define QGENX_CHECKSUM_H

#include <cstdint>

namespace qgenx {

/* CRC-32C of `size` bytes, going on from that of those before. */
using Checksum = uint32_t (*)(uint32_t crc, const uint8_t *data, uint64_t size);

constexpr uint32_t CRC_POLYNOMIAL = 0x82F63B78u; /* Castagnoli's, lowest bit first */

inline uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1) {
        if (a & 0x80000000u) product ^= b;
        b = (b >> 1) ^ ((b & 1) ? CRC_POLYNOMIAL : 0);
    }
    return product;
}

/* What `size` zero bytes make of a register: its product with x^(8 size). */
inline uint32_t crc_shift(uint32_t crc, uint64_t size) {
    uint32_t power = 0x00800000u; /* x^8 */
    for (; size; size >>= 1) {
        if (size & 1) crc = crc_multiply(power, crc);
        power = crc_multiply(power, power);
    }
    return crc;
}

}  // namespace qgenx

#endif
