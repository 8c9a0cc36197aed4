/* Code words of level indices, as the tree that the kernels walk, and the tables that rounding needs. */
#ifndef QGENX_CODE_H
#define QGENX_CODE_H

#include <cstdint>
#include <vector>

#include "qgenx.h"

namespace qgenx {

/* An inner node of the code's tree. A child is an inner node (its number), a leaf (LEAF - index) or NONE. */
struct Node {
    static constexpr int NONE = -1, LEAF = -2;
    int depth;
    int child[2];
};

enum class Runs { NONE, RICE, OMEGA };

struct Code {
    int coder = 0;
    int num_levels = 0;        /* s */
    int width = 0;             /* bits of a symbol of the fixed code, 0 for all others */
    Runs runs = Runs::NONE;    /* how zeros are coded, if not by a word of their own */
    int depth = 0;             /* bits of the longest word */
    int index_bits = 0;        /* bits that name an index 0..s */
    std::vector<Node> nodes;   /* breadth first */
    uint16_t words[128] = {};  /* first bit highest */
    uint8_t lengths[128] = {};
    uint8_t word_bytes[2][128] = {}; /* the two bytes of every word */

    int draw_bits = 16;
    bool uniform = false;      /* l_j = j / s */
    float levels[128] = {};
    bool wide_gaps = true;     /* none so small that its inverse times 2^16 would not be finite */
    float inverse_gaps[128] = {}; /* of the gap above each level */
    float unit_gaps[16] = {};     /* of the first, times 2^draw_bits */
    float halves[3][8];           /* for each j and step of a search by halves, l_(j + 4), l_(j + 2), l_(j + 1) */
    std::vector<uint8_t> start;   /* for each slot of u, how many of l_1 ... l_(s-1) its lower edge is not below */
};

/* Slots of u: its float32 bits above these, counted from the first slot, which holds all that is smaller. */
constexpr int SLOT_SHIFT = 16, FIRST_SLOT = (127 - 16) << 7, NUM_SLOTS = (16 << 7) + 2;

inline int slot_of(uint32_t bits) {
    int slot = int(bits >> SLOT_SHIFT) - FIRST_SLOT + 1;
    return slot < 0 ? 0 : slot;
}

/* Fills `code`; returns NULL, or what is wrong with the codebook. */
const char *prepare(const qgenx_codebook &book, Code &code);

/* Bits that name the symbols -s ... s. */
int fixed_width(int num_levels);

/* The most bytes that the code of n symbols takes. */
uint64_t most_bytes(const Code &code, uint64_t n);

/* Elias omega's words of 1 ... QGENX_MAX_BUCKET + 1, first bit lowest, and of what a window of bits begins with. */
struct OmegaTables {
    static constexpr int WINDOW = 11;
    struct Entry {
        uint32_t bits; /* of a word, or the number whose word a window begins with */
        uint32_t length; /* 0 if the window does not hold the whole word */
    };
    std::vector<Entry> words, windows;
};
const OmegaTables &omega_tables();

}  // namespace qgenx

#endif
