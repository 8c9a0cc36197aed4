#include "code.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qgenx {
namespace {

/* A word while it is made: first bit highest of `length` bits. */
struct Text {
    uint32_t bits = 0;
    int length = 0;
    void append(uint32_t more, int count) {
        bits = (bits << count) | more;
        length += count;
    }
};

int bit_length(uint32_t n) {
    int length = 0;
    for (; n; n >>= 1) length++;
    return length;
}

Text gamma(uint32_t n) {
    Text word;
    word.append(0, bit_length(n) - 1);
    word.append(n, bit_length(n));
    return word;
}

Text delta(uint32_t n) {
    int length = bit_length(n);
    Text word = gamma(uint32_t(length));
    word.append(n & ~(1u << (length - 1)), length - 1);
    return word;
}

Text omega(uint32_t n) {
    uint32_t groups[8];
    int count = 0;
    for (; n > 1; n = uint32_t(bit_length(n)) - 1) groups[count++] = n;
    Text word;
    while (count--) word.append(groups[count], bit_length(groups[count]));
    word.append(0, 1);
    return word;
}

Text elias(int coder, uint32_t n) {
    return coder == QGENX_ELIAS_GAMMA ? gamma(n) : coder == QGENX_ELIAS_DELTA ? delta(n) : omega(n);
}

/* Canonical words: shorter first, then by index. False if the lengths break Kraft's inequality. */
bool canonical(const uint8_t *lengths, int first, int last, Text *words) {
    uint32_t code = 0, kraft = 0;
    bool begun = false;
    for (int length = 0, previous = 0; length <= 15; length++) {
        for (int index = first; index <= last; index++) {
            if (lengths[index] != length) continue;
            code = (begun ? code + 1 : 0) << (length - previous);
            begun = true;
            previous = length;
            kraft += 1u << (15 - length);
            if (kraft > 1u << 15) return false;
            words[index].append(code, length);
        }
    }
    return true;
}

/* Inner nodes breadth first: prefixes by length, then by value. */
void grow(Code &code, const Text *words, int first) {
    struct Prefix {
        int length;
        uint32_t bits;
        bool operator<(const Prefix &other) const {
            return length != other.length ? length < other.length : bits < other.bits;
        }
        bool operator==(const Prefix &other) const { return length == other.length && bits == other.bits; }
    };
    std::vector<Prefix> prefixes;
    for (int index = first; index <= code.num_levels; index++)
        for (int length = 0; length < words[index].length; length++)
            prefixes.push_back({length, words[index].bits >> (words[index].length - length)});
    std::sort(prefixes.begin(), prefixes.end());
    prefixes.erase(std::unique(prefixes.begin(), prefixes.end()), prefixes.end());
    auto child = [&](const Prefix &prefix, uint32_t bit) {
        Prefix longer{prefix.length + 1, prefix.bits << 1 | bit};
        auto found = std::lower_bound(prefixes.begin(), prefixes.end(), longer);
        if (found != prefixes.end() && *found == longer) return int(found - prefixes.begin());
        for (int index = first; index <= code.num_levels; index++)
            if (words[index].length == longer.length && words[index].bits == longer.bits) return Node::LEAF - index;
        return Node::NONE;
    };
    for (const Prefix &prefix : prefixes)
        code.nodes.push_back({prefix.length, {child(prefix, 0), child(prefix, 1)}});
}

const char *prepare_levels(const qgenx_codebook &book, Code &code) {
    int s = code.num_levels;
    if (book.levels[0] != 0.0f || book.levels[s] != 1.0f) return "levels do not go from 0 to 1";
    code.uniform = true;
    for (int j = 0; j <= s; j++) {
        code.levels[j] = book.levels[j];
        code.uniform = code.uniform && book.levels[j] == float(double(j) / s);
        if (j == s) break;
        float gap = book.levels[j + 1] - book.levels[j];
        if (!(gap >= 0x1p-126f)) return "levels do not rise by at least 2**-126";
        code.wide_gaps = code.wide_gaps && gap >= 0x1p-100f;
        code.inverse_gaps[j] = 1.0f / gap;
    }
    code.draw_bits = s > 63 ? 15 : 16;
    for (int j = 0; j < 16; j++) code.unit_gaps[j] = code.inverse_gaps[j] * float(1 << code.draw_bits);
    for (int step = 0; step < 3; step++)
        for (int j = 0; j < 8; j++) {
            int level = j + (4 >> step);
            code.halves[step][j] = level < s ? code.levels[level] : INFINITY;
        }
    return nullptr;
}

/* Where the search for a level begins, if there are too many to compare with each. */
void prepare_search(Code &code) {
    code.start.assign(NUM_SLOTS, 0);
    for (int slot = 1; slot < NUM_SLOTS; slot++) {
        union {
            uint32_t bits;
            float value;
        } edge{uint32_t(slot - 1 + FIRST_SLOT) << SLOT_SHIFT};
        int count = 0;
        while (count < code.num_levels - 1 && code.levels[count + 1] <= edge.value) count++;
        code.start[slot] = uint8_t(count);
    }
}

const char *check_lengths(const qgenx_codebook &book, const Code &code) {
    bool same = memcmp(book.lengths, code.lengths, size_t(book.num_levels) + 1) == 0;
    return same ? nullptr : "code lengths are not those of its coder";
}

}  // namespace

const OmegaTables &omega_tables() {
    static const OmegaTables tables = [] {
        OmegaTables made;
        made.words.resize(QGENX_MAX_BUCKET + 2);
        made.windows.resize(size_t(1) << OmegaTables::WINDOW);
        for (uint32_t n = 1; n < made.words.size(); n++) {
            Text text = omega(n);
            OmegaTables::Entry &word = made.words[n];
            word.length = uint32_t(text.length);
            for (int i = 0; i < text.length; i++) word.bits |= ((text.bits >> (text.length - 1 - i)) & 1u) << i;
            if (text.length > OmegaTables::WINDOW) continue;
            for (uint32_t rest = 0; rest < 1u << (OmegaTables::WINDOW - text.length); rest++)
                made.windows[word.bits | rest << text.length] = {n, word.length};
        }
        return made;
    }();
    return tables;
}

const char *prepare(const qgenx_codebook &book, Code &code) {
    if (book.coder > QGENX_ELIAS_RUNS) return "coder is unknown";
    if (book.num_levels < 1 || book.num_levels > QGENX_MAX_LEVELS) return "num_levels is not between 1 and 127";
    code.coder = int(book.coder);
    code.num_levels = int(book.num_levels);
    code.index_bits = bit_length(book.num_levels);
    if (const char *wrong = prepare_levels(book, code)) return wrong;
    if (code.num_levels > 15) prepare_search(code);
    if (book.coder == QGENX_FIXED) {
        code.width = fixed_width(code.num_levels);
        return check_lengths(book, code);
    }
    if (book.coder == QGENX_ELIAS_RUNS) code.runs = Runs::OMEGA;
    if (book.coder == QGENX_HUFFMAN && book.lengths[0] == 0) code.runs = Runs::RICE;
    int first = code.runs == Runs::NONE ? 0 : 1;
    Text words[128];
    if (book.coder == QGENX_HUFFMAN) {
        for (int index = first; index <= code.num_levels; index++) {
            bool alone = code.num_levels == first;
            if (book.lengths[index] > 15 || (book.lengths[index] == 0 && !alone))
                return "code lengths are not between 1 and 15";
        }
        if (!canonical(book.lengths, first, code.num_levels, words))
            return "code lengths that break Kraft's inequality";
    } else {
        for (int index = first; index <= code.num_levels; index++)
            words[index] = elias(code.coder, uint32_t(index + 1 - first));
    }
    for (int index = first; index <= code.num_levels; index++) {
        code.depth = std::max(code.depth, words[index].length);
        code.lengths[index] = uint8_t(words[index].length);
        code.words[index] = uint16_t(words[index].bits << (16 - words[index].length));
        code.word_bytes[0][index] = uint8_t(code.words[index] >> 8);
        code.word_bytes[1][index] = uint8_t(code.words[index]);
    }
    grow(code, words, first);
    return check_lengths(book, code);
}

int fixed_width(int num_levels) { return bit_length(2 * uint32_t(num_levels)); }

uint64_t most_bytes(const Code &code, uint64_t n) {
    if (code.width) return (n * uint64_t(code.width) + 7) / 8;
    uint64_t symbol = uint64_t(code.depth) + 1;
    return code.runs == Runs::NONE ? (n * symbol + 7) / 8 : (n * (symbol + 2) + 24 + 7) / 8;
}

}  // namespace qgenx
