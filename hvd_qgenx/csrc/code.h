/* Code words of level indices, as the tree that the kernels walk, and the tables that rounding needs. */
#ifndef QGENX_CODE_H
#define QGENX_CODE_H

#include <cstdint>
#include <vector>

#include "qgenx.h"

namespace qgenx {

/* An inner node of the code's tree, which is followed to find out which words have a bit at each depth. A child is an
 * inner node (its number), or NONE where no word goes on, or ENDS where no more has to be known. A node does not branch
 * if all words below it are equally long and none is missing. */
struct Node {
    static constexpr int NONE = -1, ENDS = -2;
    int depth;
    bool branches;
    int child[2];
};

enum class Runs { NONE, RICE, OMEGA };

/* How rounding finds the level below a value and the gap above it. Each way but UNIFORM has tables of its own in Code,
 * and the largest that fits is prepared: a path takes that way and no other. */
enum class Search {
    UNIFORM, /* l_j = j / s: by a product */
    SHORT,   /* at most seven levels whose lower 16 bits are zeros: by comparing upper halves, 16 at once */
    EIGHT,   /* at most 8: by comparing; gaps in one vector, times 2^draw_bits */
    SIXTEEN, /* at most 15: the same with two vectors */
    SLOTS    /* all others, and those with a gap below 2^-90: from where `start` says on */
};

struct Code {
    int coder = 0;
    int num_levels = 0;          /* s */
    int width = 0;               /* bits of a symbol of the fixed code, 0 for all others */
    Runs runs = Runs::NONE;      /* how zeros are coded, if not by a word of their own */
    bool ones = false;           /* whether the ones among the non-zeros are coded as runs too */
    bool few = true;             /* at most 16 symbols: their lowest four bits name them */
    int depth = 0;               /* bits of the longest word */
    int shortest = 0;            /* and of the shortest */
    std::vector<Node> nodes;     /* breadth first */
    std::vector<int> covers[16]; /* of each depth from the shortest word's on: nodes below which words have that bit */
    uint16_t words[256] = {};    /* of each symbol's low byte, first bit highest */
    uint8_t few_words[2][16] = {}; /* the first and second byte of words by the symbols' lowest four bits, if few */
    std::vector<int8_t> symbols;   /* for reading: of each word's first `depth` bits, zeros behind shorter ones */

    struct Longer {
        uint8_t first;
        int8_t symbols[16];
    };
    /* For reading a few by halves of a byte: the symbols of the words' first four bits, and for those that do not
     * decide, of the next four. Only if no word is longer than a byte. */
    int8_t short_symbols[16] = {};
    std::vector<Longer> longer;

    int draw_bits = 31; /* 31 behind each level, or behind 0 if they are evenly spaced */
    float levels[128] = {};
    float inverse_gaps[128] = {}; /* of the gap above each level */
    Search search = Search::SLOTS;
    float unit_gaps[16] = {};     /* SHORT to SIXTEEN: the inverses times 2^draw_bits, all of them finite */
    int16_t short_levels[6] = {}; /* SHORT: what the upper bits of l_1 ... l_6 are above */
    std::vector<uint8_t> start; /* SLOTS: for each slot of u, how many of l_1 ... l_(s-1) its lower edge is not below */
};

/* Slots of u: its float32 bits above these, counted from the first slot, which holds all that is smaller. */
constexpr int SLOT_SHIFT = 16, FIRST_SLOT = (127 - 16) << 7, NUM_SLOTS = (16 << 7) + 2;
constexpr int GATHER_PAD = 3; /* bytes after the last slot, since vectors fetch four for one */

inline int slot_of(uint32_t bits) {
    int slot = int(bits >> SLOT_SHIFT) - FIRST_SLOT + 1;
    return slot < 0 ? 0 : slot;
}

/* Fills `code`, for decoding too if `reading`; returns NULL, or what is wrong with the codebook. */
const char *prepare(const qgenx_codebook &book, Code &code, bool reading);

/* Bits that name the symbols -s ... s. */
int fixed_width(int num_levels);

/* What one stage of runs in a bucket, of zeros or of ones, takes at most beside two bits for each of its elements. */
constexpr uint64_t RUNS_MOST_BITS = 24;

/* What one symbol takes at most, two such stages included; so the bytes of a bucket fit the 16 bits of its length. */
constexpr uint64_t SYMBOL_MOST_BITS = 20;

/* The most bytes that the code of n symbols takes. */
uint64_t most_bytes(const Code &code, uint64_t n);

/* Elias omega's words of 1 ... QGENX_MAX_BUCKET + 1, first bit lowest, and of what a window of bits begins with. */
struct OmegaTables {
    static constexpr int WINDOW = 11;
    struct Entry {
        uint32_t bits;   /* of a word, or the number whose word a window begins with */
        uint32_t length; /* 0 if the window does not hold the whole word */
    };
    std::vector<Entry> words, windows;
};
const OmegaTables &omega_tables();

}  // namespace qgenx

#endif
