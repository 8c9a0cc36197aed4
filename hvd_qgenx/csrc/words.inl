/* Code words of a bucket's symbols, depth by depth: the first bits of all words, the second bits of those that have
 * one, and so on.
 * Included by avx2.cpp and portable.cpp, each into its namespace, after bits.inl. Needs there: word_planes, symbols_of.
 */

static const char *const PAST_END = "a bucket whose code words pass its end";
static const char *const NO_WORD = "a code word that does not exist";

/* Masks are handled four at a time; behind those of a bucket they hold whatever there was, or zeros. */
constexpr int BLOCK = 4;

inline int blocks_of(int n) { return (n + 64 * BLOCK - 1) / (64 * BLOCK); }

inline uint64_t valid_mask(int n, int number) {
    int left = n - 64 * number;
    return left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
}

/* to = a & b, a & ~b, to | a */
inline void and_masks(uint64_t *to, const uint64_t *a, const uint64_t *b, int blocks) {
    for (int m = 0; m < BLOCK * blocks; m += BLOCK)
        for (int k = 0; k < BLOCK; k++) to[m + k] = a[m + k] & b[m + k];
}
inline void and_not_masks(uint64_t *to, const uint64_t *a, const uint64_t *b, int blocks) {
    for (int m = 0; m < BLOCK * blocks; m += BLOCK)
        for (int k = 0; k < BLOCK; k++) to[m + k] = a[m + k] & ~b[m + k];
}
inline void or_masks(uint64_t *to, const uint64_t *a, int blocks) {
    for (int m = 0; m < BLOCK * blocks; m += BLOCK)
        for (int k = 0; k < BLOCK; k++) to[m + k] |= a[m + k];
}

/* Which elements pass each node of a code's tree, known depth by depth. */
struct Passing {
    const Code &code;
    int blocks, stride;
    uint64_t *of_nodes, *any, *lost; /* all nodes'; of a depth with several; of a branch without words */

    Passing(const Code &of, int n, Scratch &scratch)
        : code(of),
          blocks(blocks_of(n)),
          stride(scratch.masks),
          of_nodes(scratch.passing.get()),
          any(scratch.planes.get() + 16 * stride),
          lost(any + stride) {
        for (int m = 0; m < BLOCK * blocks; m++) of_nodes[m] = valid_mask(n, m);
    }

    /* The elements whose words have a bit at this depth, which is not less than the shortest word's length. */
    const uint64_t *at(int depth) {
        const std::vector<int> &covers = code.covers[depth];
        const uint64_t *first = of_nodes + covers[0] * stride;
        if (covers.size() == 1) return first;
        memcpy(any, first, size_t(BLOCK * blocks) * 8);
        for (size_t i = 1; i < covers.size(); i++) or_masks(any, of_nodes + covers[i] * stride, blocks);
        return any;
    }

    /* Goes on by the bits of a depth from the nodes there, `number` being the first; false if a word does not exist. */
    bool follow(int depth, const uint64_t *ones, size_t &number) {
        for (; number < code.nodes.size() && code.nodes[number].depth == depth; number++) {
            const Node &node = code.nodes[number];
            const uint64_t *pass = of_nodes + number * stride;
            for (int bit = 0; bit < 2 && node.branches; bit++) {
                int child = node.child[bit];
                if (child == Node::ENDS) continue;
                uint64_t *to = child >= 0 ? of_nodes + child * stride : lost;
                bit ? and_masks(to, pass, ones, blocks) : and_not_masks(to, pass, ones, blocks);
                if (child == Node::NONE && any_of(lost)) return false;
            }
        }
        return true;
    }

    bool any_of(const uint64_t *mask) const {
        uint64_t found = 0;
        for (int m = 0; m < BLOCK * blocks; m++) found |= mask[m];
        return found != 0;
    }
};

/* Goes through the planes depth by depth. `move` writes or reads the bits of the elements in `pass` (NULL for all of
 * them), which are `few` beyond the shortest words' end, and tells whether they were there. */
template <class Move>
static const char *by_depth(const Code &code, int n, Scratch &scratch, Move move) {
    Passing passing(code, n, scratch);
    size_t number = 0;
    for (int depth = 0; depth < code.depth; depth++) {
        uint64_t *ones = scratch.planes.get() + depth * scratch.masks;
        if (!move(ones, depth < code.shortest ? nullptr : passing.at(depth), depth > code.shortest)) return PAST_END;
        if (!passing.follow(depth, ones, number)) return NO_WORD;
    }
    return nullptr;
}

static void write_words(const Code &code, const int8_t *symbols, int n, Writer &writer, Scratch &scratch) {
    int masks = (n + 63) / 64;
    word_planes(code, symbols, masks, scratch.masks, scratch.planes.get());
    by_depth(code, n, scratch, [&](const uint64_t *ones, const uint64_t *pass, bool few) {
        if (!pass)
            writer.put_first(ones, n);
        else if (few)
            writer.put_at_few(ones, pass, masks);
        else
            writer.put_at(ones, pass, masks);
        return true;
    });
}

static const char *read_words(const Code &code, Reader &reader, int n, uint8_t *symbols, Scratch &scratch) {
    int masks = (n + 63) / 64;
    const char *wrong = by_depth(code, n, scratch, [&](uint64_t *ones, const uint64_t *pass, bool few) {
        if (!pass)
            reader.get_first(ones, n);
        else if (few)
            reader.get_at_few(ones, pass, masks);
        else
            reader.get_at(ones, pass, masks);
        scratch.ahead.lines(masks / 2);
        return reader.at <= reader.end;
    });
    if (!wrong) symbols_of(code, scratch.planes.get(), masks, scratch.masks, symbols);
    return wrong;
}
