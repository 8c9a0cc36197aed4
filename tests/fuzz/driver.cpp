/* Runs the fuzz target without libFuzzer: on payloads, then on mutations of them, the same for the same seed.
 *
 *     driver [--runs N] [--seed S] [--write FOLDER] FILE...
 *
 * The files are payloads, or whatever an input may be; to them come payloads of every coder that are made here. With
 * --write these are written to a folder, as a corpus for libFuzzer.
 */
#include <string>

#include "inputs.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

const uint64_t EXTREMES[] = {0,          1,          2,          3,         127,        128,        255,
                             256,        16384,      16385,      0xFFFF,    0x10000,    0x7FFFFFFF, 0x80000000,
                             0xFFFFFFFF, 1ull << 32, 1ull << 62, INT64_MAX, 1ull << 63, UINT64_MAX};

Bytes read_file(const char *name) {
    FILE *file = fopen(name, "rb");
    REQUIRE(file);
    Bytes bytes;
    for (int byte; (byte = fgetc(file)) != EOF;) bytes.push_back(uint8_t(byte));
    fclose(file);
    return bytes;
}

void write_file(const std::string &name, const Bytes &bytes) {
    FILE *file = fopen(name.c_str(), "wb");
    REQUIRE(file && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
    fclose(file);
}

std::vector<float> make_vector(size_t numel, Random &random) {
    std::vector<float> vector(numel);
    for (float &value : vector) value = random.below(3) ? 0.0f : random.normal();
    return vector;
}

/* A payload of each kind, alone and two in one input. */
std::vector<Bytes> make_payloads(Random &random) {
    std::vector<Bytes> made;
    std::vector<uint64_t> sizes = {130, 3, 0, 67};
    for (uint32_t num_levels : {1u, 3u, 7u, 20u, 127u})
        for (uint32_t coder = QGENX_FIXED; coder <= QGENX_ELIAS_RUNS; coder++)
            for (Words words : {Words::FLAT, Words::SKEWED, Words::RUNS, Words::ONES}) {
                if (coder != QGENX_HUFFMAN && words != Words::FLAT) continue;
                Table table = num_levels == 20 ? Table::CROWDED : Table::UNIFORM;
                qgenx_codebook book = make_book(coder, num_levels, table, words);
                Job job(sizes, words == Words::SKEWED ? 16384 : 64, coder & 1, 4, num_levels != 7);
                Bytes one = encode(book, job, make_vector(200, random), 1, QGENX_PORTABLE), two = one;
                two.insert(two.end(), one.begin(), one.end());
                made.push_back(one);
                for (Bytes *input : {&two, &one})
                    for (uint64_t options : {0, 32}) { /* as it is, and by a map of sections */
                        options |= input == &two ? 2 : 4;
                        put(input->data() + At::SEED, options | uint64_t(one.size()) << 48);
                        put(input->data() + At::STEP, random.next());
                        made.push_back(*input);
                    }
            }
    return made;
}

/* One change. `others` are payloads to splice with. */
void mutate(Bytes &input, const std::vector<Bytes> &others, Random &random) {
    uint64_t at = random.below(input.size());
    const Bytes &other = others[random.below(others.size())];
    switch (random.below(9)) {
        case 0: /* cut the end off */
            input.resize(at);
            break;
        case 1: /* a bit */
            if (!input.empty()) input[at] ^= uint8_t(1 << random.below(8));
            break;
        case 2: /* a byte */
            if (!input.empty()) input[at] = uint8_t(random.next());
            break;
        case 3: /* some bytes */
            for (uint64_t i = at; i < input.size() && i < at + 8; i++) input[i] = uint8_t(random.next());
            break;
        case 4: { /* a header's field */
            const Field &field = FIELDS[random.below(sizeof(FIELDS) / sizeof(*FIELDS))];
            uint64_t value = EXTREMES[random.below(sizeof(EXTREMES) / sizeof(*EXTREMES))];
            if (input.size() >= At::END) memcpy(&input[field.offset], &value, field.size);
            break;
        }
        case 5: { /* four or eight bytes behind the header */
            uint64_t value = EXTREMES[random.below(sizeof(EXTREMES) / sizeof(*EXTREMES))], size = 4 << random.below(2);
            if (at >= At::END && at + size <= input.size()) memcpy(&input[at], &value, size);
            break;
        }
        case 6: /* another's end */
            input.resize(at);
            input.insert(input.end(), other.begin() + long(at < other.size() ? at : other.size()), other.end());
            break;
        case 7: /* bytes taken out */
            input.erase(input.begin() + long(at), input.begin() + long(at + random.below(input.size() - at + 1)));
            break;
        case 8: /* bytes put in */
            for (uint64_t count = random.below(16); count; count--)
                input.insert(input.begin() + long(at), uint8_t(random.next()));
            break;
    }
}

Bytes random_bytes(Random &random) {
    Bytes bytes(random.below(300));
    for (uint8_t &byte : bytes) byte = uint8_t(random.next());
    return bytes;
}

void run(const Bytes &input) { LLVMFuzzerTestOneInput(input.data(), input.size()); }

}  // namespace

int main(int count, char **arguments) {
    uint64_t runs = 100000, seed = 1;
    std::string folder;
    std::vector<Bytes> inputs;
    for (int i = 1; i < count; i++) {
        std::string word = arguments[i];
        if (i + 1 < count && word == "--runs")
            runs = strtoull(arguments[++i], nullptr, 10);
        else if (i + 1 < count && word == "--seed")
            seed = strtoull(arguments[++i], nullptr, 10);
        else if (i + 1 < count && word == "--write")
            folder = arguments[++i];
        else
            inputs.push_back(read_file(arguments[i]));
    }
    Random random{seed};
    for (const Bytes &made : make_payloads(random)) inputs.push_back(made);
    for (size_t i = 0; i < inputs.size(); i++) {
        if (!folder.empty()) write_file(folder + "/seed" + std::to_string(i), inputs[i]);
        run(inputs[i]);
    }
    for (uint64_t i = 0; folder.empty() && i < runs; i++) {
        Bytes input = random.below(50) ? inputs[random.below(inputs.size())] : random_bytes(random);
        for (uint64_t changes = 1 + random.below(4); changes; changes--) mutate(input, inputs, random);
        run(input);
    }
    return 0;
}
