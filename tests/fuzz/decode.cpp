/* The fuzz target: any bytes, through qgenx_parse and qgenx_decode_mean, on both paths.
 *
 * Neither may crash, nor take memory beyond the header's promise; both must say the same, and decode to the same
 * floats, finite ones unless a norm or raw value is NaN. What is refused is refused by the name of a field.
 *
 * The input is a payload. Its seed, which no decoder reads, says how it is used: bit 0, that size and checksum stay as
 * they are (else they are made right); bit 1, that there are two payloads, cut where the seed's upper 16 bits say;
 * bit 2, that the first payload comes twice; bit 3, that the caller's codebook is not the one that the header names.
 */
#include "inputs.h"

namespace {

constexpr uint64_t MOST = 1 << 16; /* coordinates that are decoded; the caller allocates them, not the core */
constexpr size_t OPTIONS = At::SEED, CUT = At::SEED + 6;
const char *const NAMES[] = {"size",  "magic",      "version",     "checksum", "flags",  "reserved",     "norm",
                             "coder", "num_levels", "bucket_size", "numel",    "levels", "code lengths", "codebook",
                             "sizes", "raw",        "norms",       "lengths",  "coded"};

struct Tally {
    uint64_t tried = 0, rejected = 0, too_long = 0;
    ~Tally() {
        fprintf(stderr, "%llu inputs tried, %llu of them refused, %llu with too many coordinates to decode\n",
                (unsigned long long)tried, (unsigned long long)rejected, (unsigned long long)too_long);
    }
} tally;

struct Outcome {
    int status;
    char message[QGENX_MESSAGE];
    uint64_t numel;

    bool operator==(const Outcome &other) const {
        return status == other.status && (status ? !strcmp(message, other.message) : numel == other.numel);
    }
};

/* Each payload in memory of its own, of its size to the byte. */
struct Input {
    std::vector<Bytes> payloads;
    qgenx_codebook book;
};

Input read_input(const uint8_t *data, size_t size) {
    uint8_t options = size > OPTIONS ? data[OPTIONS] : 0;
    size_t cut = size;
    if ((options & 2) && size > CUT + 1) cut = get<uint16_t>(data + CUT) % size;
    Input input;
    input.payloads.emplace_back(data, data + cut);
    if (options & 2) input.payloads.emplace_back(data + cut, data + size);
    if (options & 4) input.payloads.push_back(input.payloads[0]);
    for (Bytes &payload : input.payloads)
        if (!(options & 1)) sign(payload);
    bool whole = size >= At::END;
    uint32_t coder = whole ? data[At::CODER] % 6 : 0,
             num_levels = whole ? (data[At::NUM_LEVELS] - 1u) % QGENX_MAX_LEVELS + 1 : 3;
    uint64_t hash = whole ? get<uint64_t>(data + At::CODEBOOK) + (options & 8) : 0;
    input.book =
        make_book(coder, num_levels, Table::UNIFORM, Words(options >> 4 & 1 ? Words::RUNS : Words::FLAT), hash);
    return input;
}

void check_name(const Outcome &outcome) {
    if (outcome.status == QGENX_OK) return;
    REQUIRE(outcome.status == QGENX_BAD_PAYLOAD);
    for (const char *name : NAMES)
        if (!strncmp(outcome.message, name, strlen(name))) return;
    fprintf(stderr, "\"%s\" names no field\n", outcome.message);
    abort();
}

Outcome parse(const Bytes &payload, qgenx_path path) {
    Outcome outcome = {};
    memory::Watch watch;
    outcome.status = qgenx_parse(payload.data(), payload.size(), -1, &outcome.numel, path, outcome.message);
    memory::check(1, 0);
    return outcome;
}

Outcome decode(const Input &input, std::vector<float> &out, qgenx_path path) {
    std::vector<const uint8_t *> payloads;
    std::vector<uint64_t> sizes;
    for (const Bytes &payload : input.payloads) {
        payloads.push_back(payload.data());
        sizes.push_back(payload.size());
    }
    Outcome outcome = {};
    memory::Watch watch;
    outcome.status = qgenx_decode_mean(&input.book, payloads.data(), sizes.data(), uint32_t(payloads.size()),
                                       out.data(), out.size(), 1, path, outcome.message);
    memory::check(int64_t(payloads.size()), 1);
    return outcome;
}

bool same(const std::vector<float> &a, const std::vector<float> &b) {
    for (size_t i = 0; i < a.size(); i++)
        if (get<uint32_t>(reinterpret_cast<const uint8_t *>(&a[i])) !=
                get<uint32_t>(reinterpret_cast<const uint8_t *>(&b[i])) &&
            !(std::isnan(a[i]) && std::isnan(b[i])))
            return false;
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    tally.tried++;
    Input input = read_input(data, size);
    qgenx_path best = qgenx_best_path();
    Outcome parsed = parse(input.payloads[0], QGENX_PORTABLE);
    check_name(parsed);
    REQUIRE(parsed == parse(input.payloads[0], best));
    if (!parsed.status && parsed.numel > MOST) {
        tally.too_long++;
        /* few bytes cannot ask for much: a bucket has a norm */
        REQUIRE(parsed.numel / QGENX_MAX_BUCKET <= size / 4);
        return 0;
    }
    std::vector<float> one(parsed.status ? 3 : parsed.numel, 0.5f), two(one.size(), -0.5f);
    Outcome decoded = decode(input, one, QGENX_PORTABLE);
    check_name(decoded);
    REQUIRE(decoded == decode(input, two, best));
    REQUIRE(!parsed.status || decoded.status);
    tally.rejected += decoded.status != QGENX_OK;
    if (decoded.status) return 0;
    REQUIRE(same(one, two));
    if (input.payloads.size() > 1) return 0; /* a sum may exceed float32 */
    for (float value : one) REQUIRE(!std::isinf(value));
    return 0;
}
