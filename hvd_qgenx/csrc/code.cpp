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

/* A symbol's word, as a number of 16 bits: first bit highest, zeros behind. */
struct Word {
    uint32_t bits;
    int length, symbol;
};

/* Canonical words: shorter first, then by symbol. False if the lengths break Kraft's inequality. */
bool canonical(const uint8_t *lengths, std::vector<Word> &words) {
    uint32_t next = 0;
    for (int length = 1; length <= 15; length++)
        for (Word &word : words) {
            if (lengths[word.symbol] != length) continue;
            word.bits = next;
            word.length = length;
            next += 1u << (16 - length);
            if (next > 1u << 16) return false;
        }
    return true;
}

/* Elias' word of the magnitude, and its sign. */
void elias_words(int coder, int least, std::vector<Word> &words) {
    for (Word &word : words) {
        int magnitude = word.symbol < 0 ? -word.symbol : word.symbol;
        Text text = elias(coder, uint32_t(magnitude + 1 - least));
        if (magnitude) text.append(word.symbol < 0, 1);
        word.bits = text.bits << (16 - text.length);
        word.length = text.length;
    }
}

/* Words from `first` to `last` that share their first `depth` bits. */
struct Range {
    const Word *first, *last;
    int depth;

    /* The bits that each of these words goes on for, if they are equally many and no word is missing; else -1. */
    int height() const {
        int length = first->length;
        for (const Word *word = first; word < last; word++)
            if (word->length != length) return -1;
        return last - first == 1 << (length - depth) ? length - depth : -1;
    }
    Range child(int bit) const {
        const Word *middle = first; /* words are sorted, so that those with a zero here come first */
        while (middle < last && !(middle->bits >> (15 - depth) & 1)) middle++;
        return bit ? Range{middle, last, depth + 1} : Range{first, middle, depth + 1};
    }
};

/* Inner nodes breadth first: by the length of their prefix, then by its value. */
void grow(Code &code, std::vector<Word> &words) {
    std::sort(words.begin(), words.end(), [](const Word &a, const Word &b) { return a.bits < b.bits; });
    std::vector<Range> ranges(1, Range{words.data(), words.data() + words.size(), 0});
    for (size_t number = 0; number < ranges.size(); number++) {
        Range range = ranges[number];
        int height = range.height();
        Node node{range.depth, height < 0, {Node::NONE, Node::NONE}};
        for (int bit = 0; bit < 2 && node.branches; bit++) {
            Range child = range.child(bit);
            if (child.first == child.last) continue;
            int end = child.depth + child.height();
            /* a subtree of whole words that ends with the shortest one has no bit that some words lack */
            bool needed = child.height() < 0 || (child.height() > 0 && end > code.shortest);
            node.child[bit] = needed ? int(ranges.size()) : Node::ENDS;
            if (needed) ranges.push_back(child);
        }
        code.nodes.push_back(node);
        for (int depth = node.depth; depth < node.depth + (node.branches ? 1 : height); depth++)
            if (depth >= code.shortest) code.covers[depth].push_back(int(number));
    }
}

/* The symbols of words, found by their bits. */
void prepare_reading(Code &code, const std::vector<Word> &words) {
    /* zeros after a short word are all that can be read there: bits of absent planes are zeros */
    code.symbols.assign(size_t(1) << code.depth, 0);
    for (const Word &word : words) code.symbols[word.bits >> (16 - code.depth)] = int8_t(word.symbol);
    if (!code.few || code.depth > 8) return;
    for (const Word &word : words) {
        uint8_t first = uint8_t(word.bits >> 12), second = word.bits >> 8 & 15;
        if (word.length <= 4) {
            code.short_symbols[first] = int8_t(word.symbol);
            continue;
        }
        if (code.longer.empty() || code.longer.back().first != first) code.longer.push_back({first, {}});
        code.longer.back().symbols[second] = int8_t(word.symbol); /* words are sorted */
    }
}

/* Levels and the inverses of their gaps; NULL, or what is wrong with them. */
const char *prepare_levels(const qgenx_codebook &book, Code &code) {
    int s = code.num_levels;
    if (book.levels[0] != 0.0f || book.levels[s] != 1.0f) return "levels do not go from 0 to 1";
    for (int j = 0; j <= s; j++) {
        code.levels[j] = book.levels[j];
        if (j == s) break;
        float gap = book.levels[j + 1] - book.levels[j];
        if (!(gap >= 0x1p-126f)) return "levels do not rise by at least 2**-126";
        code.inverse_gaps[j] = 1.0f / gap;
    }
    return nullptr;
}

bool is_uniform(const Code &code) {
    for (int j = 0; j <= code.num_levels; j++)
        if (code.levels[j] != float(double(j) / code.num_levels)) return false;
    return true;
}

/* Whether no gap is so small that its inverse times 2^31 might not be finite. */
bool has_wide_gaps(const Code &code) {
    for (int j = 0; j < code.num_levels; j++)
        if (code.levels[j + 1] - code.levels[j] < 0x1p-90f) return false;
    return true;
}

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

bool has_short_levels(const Code &code) {
    for (int j = 1; j < code.num_levels; j++)
        if (bits_of(code.levels[j]) & 0xFFFF) return false;
    return true;
}

Search search_of(const Code &code) {
    if (is_uniform(code)) return Search::UNIFORM; /* not only faster: its arithmetic is another, see wire_format.md */
    if (code.num_levels > 15 || !has_wide_gaps(code)) return Search::SLOTS;
    if (code.num_levels > 8) return Search::SIXTEEN;
    return code.num_levels < 8 && has_short_levels(code) ? Search::SHORT : Search::EIGHT;
}

void prepare_slots(Code &code) {
    code.start.assign(NUM_SLOTS + GATHER_PAD, 0);
    for (int slot = 1; slot < NUM_SLOTS; slot++) {
        uint32_t edge_bits = uint32_t(slot - 1 + FIRST_SLOT) << SLOT_SHIFT;
        float edge;
        memcpy(&edge, &edge_bits, 4);
        int count = 0;
        while (count < code.num_levels - 1 && code.levels[count + 1] <= edge) count++;
        code.start[size_t(slot)] = uint8_t(count);
    }
}

/* Chooses how levels are searched, and makes the tables for that way alone. */
void prepare_search(Code &code) {
    code.search = search_of(code);
    code.draw_bits = code.search == Search::UNIFORM ? 31 - bit_length(uint32_t(code.num_levels)) : 31;
    if (code.search == Search::UNIFORM) return;
    if (code.search == Search::SLOTS) return prepare_slots(code);
    for (int j = 0; j < code.num_levels; j++) code.unit_gaps[j] = code.inverse_gaps[j] * float(1u << code.draw_bits);
    for (int j = 1; j < 7 && code.search == Search::SHORT; j++)
        code.short_levels[j - 1] = j < code.num_levels ? int16_t(int(bits_of(code.levels[j]) >> 16) - 1) : INT16_MAX;
}

/* Which symbols have words, by the lengths, or why these are none; zeros and ones may be runs. */
const char *list_symbols(const uint8_t *lengths, Code &code, std::vector<Word> &words) {
    int s = code.num_levels;
    if (code.coder == QGENX_ELIAS_RUNS) code.runs = Runs::OMEGA;
    if (code.coder == QGENX_HUFFMAN && lengths[0] == 0) code.runs = Runs::RICE;
    code.ones = code.runs == Runs::RICE && s > 1 && lengths[-1] == 1 && lengths[1] == 1;
    int least = code.ones ? 2 : code.runs != Runs::NONE ? 1 : 0;
    for (int symbol = -s; symbol <= s; symbol++) {
        if (-least < symbol && symbol < least) continue;
        if (code.coder == QGENX_HUFFMAN && (lengths[symbol] < 1 || lengths[symbol] > 15))
            return "code lengths are not between 1 and 15";
        words.push_back({0, 0, symbol});
    }
    if (code.coder == QGENX_HUFFMAN)
        return canonical(lengths, words) ? nullptr : "code lengths that break Kraft's inequality";
    elias_words(code.coder, code.runs == Runs::NONE ? 0 : 1, words);
    for (const Word &word : words)
        if (word.length != lengths[word.symbol]) return "code lengths are not those of its coder";
    return code.runs == Runs::NONE || lengths[0] == 0 ? nullptr : "code lengths are not those of its coder";
}

const char *check_no_lengths(const qgenx_codebook &book) {
    for (uint32_t i = 0; i <= 2 * book.num_levels; i++)
        if (book.lengths[i]) return "code lengths are not those of its coder";
    return nullptr;
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

const char *prepare(const qgenx_codebook &book, Code &code, bool reading) {
    if (book.coder > QGENX_ELIAS_RUNS) return "coder is unknown";
    if (book.num_levels < 1 || book.num_levels > QGENX_MAX_LEVELS) return "num_levels is not between 1 and 127";
    code.coder = int(book.coder);
    code.num_levels = int(book.num_levels);
    code.few = code.num_levels < 8;
    if (const char *wrong = prepare_levels(book, code)) return wrong;
    prepare_search(code);
    if (book.coder == QGENX_FIXED) {
        code.width = fixed_width(code.num_levels);
        return check_no_lengths(book);
    }
    std::vector<Word> words;
    if (const char *wrong = list_symbols(book.lengths + book.num_levels, code, words)) return wrong;
    code.shortest = 16;
    for (const Word &word : words) {
        code.words[uint8_t(word.symbol)] = uint16_t(word.bits);
        if (code.few) code.few_words[0][word.symbol & 15] = uint8_t(word.bits >> 8);
        if (code.few) code.few_words[1][word.symbol & 15] = uint8_t(word.bits);
        code.depth = std::max(code.depth, word.length);
        code.shortest = std::min(code.shortest, word.length);
    }
    grow(code, words);
    if (reading) prepare_reading(code, words);
    return nullptr;
}

int fixed_width(int num_levels) { return bit_length(2 * uint32_t(num_levels)); }

uint64_t most_bytes(const Code &code, uint64_t n) {
    if (code.width) return (n * uint64_t(code.width) + 7) / 8;
    uint64_t stages = code.runs == Runs::NONE ? 0 : code.ones ? 2 : 1;
    return (n * (uint64_t(code.depth) + 2 * stages) + RUNS_MOST_BITS * stages + 7) / 8;
}

}  // namespace qgenx
