/* The fuzz target: any bytes, through qgenx_parse and qgenx_decode_mean, on both paths.
 *
 * Neither may crash, nor take memory beyond the header's promise; both must say the same, and decode to the same
 * floats: the sums of what each payload decodes to alone, finite unless a norm or raw value is NaN. What is refused is
 * refused by the name of a field.
 *
 * The input is a payload. Its seed, which no decoder reads, says how it is used: bit 0, that size and checksum stay as
 * they are (else they are made right); bit 1, that there are two payloads, cut where the seed's upper 16 bits say;
 * bit 2, that the first payload comes twice; bit 3, that the caller's codebook is not the one that the header names;
 * bit 4, that this one has runs; bit 5, that sections are mapped at random, as the payload's step says.
 */
#include "inputs.h"

namespace {

constexpr uint64_t MOST = 1 << 16; /* coordinates that are decoded; the caller allocates them, not the core */
constexpr size_t OPTIONS = At::SEED, CUT = At::SEED + 6;
const char *const NAMES[] = {"size",     "magic",  "version",      "checksum",   "flags",
                             "reserved", "norm",   "coder",        "num_levels", "bucket_size",
                             "numel",    "levels", "code lengths", "codebook",   "num_segments",
                             "sizes",    "raw",    "norms",        "lengths",    "coded"};

struct Tally {
    uint64_t tried = 0, rejected = 0, too_long = 0, compared = 0;
    ~Tally() {
        fprintf(stderr,
                "%llu inputs tried, %llu of them refused, %llu with too many coordinates to decode, %llu compared "
                "with their payloads' sums\n",
                (unsigned long long)tried, (unsigned long long)rejected, (unsigned long long)too_long,
                (unsigned long long)compared);
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
    bool mapped;
    Random random;
};

Input read_input(const uint8_t *data, size_t size) {
    uint8_t options = size > OPTIONS ? data[OPTIONS] : 0;
    size_t cut = size;
    if ((options & 2) && size > CUT + 1) cut = get<uint16_t>(data + CUT) % size;
    Input input = {};
    input.payloads.emplace_back(data, data + cut);
    if (options & 2) input.payloads.emplace_back(data + cut, data + size);
    if (options & 4) input.payloads.push_back(input.payloads[0]);
    for (Bytes &payload : input.payloads)
        if (!(options & 1)) sign(payload);
    bool whole = size >= At::END;
    input.mapped = options & 32;
    input.random.state = whole ? get<uint64_t>(data + At::STEP) : 0;
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

/* What a payload that has been parsed says of its segments. */
std::vector<uint64_t> sizes_of(const Bytes &payload) {
    size_t inlined = payload[At::FLAGS] & 1 ? 6 * size_t(payload[At::NUM_LEVELS]) + 1 : 0;
    std::vector<uint64_t> sizes(get<uint32_t>(payload.data() + At::NUM_SEGMENTS));
    for (size_t i = 0; i < sizes.size(); i++) sizes[i] = get<uint64_t>(payload.data() + At::END + inlined + 8 * i);
    return sizes;
}

/* What is asked for. */
struct Target {
    std::vector<uint64_t> sizes;
    std::vector<int32_t> sections; /* none: each payload's own */
    float divisor = 1.0f, factor = 1.0f;
};

/* A section of that size, or -1; now and then any other. */
int32_t pick(const std::vector<uint64_t> &sizes, uint64_t size, Random &random) {
    if (random.below(64) == 0) return int32_t(random.below(sizes.size() + 2));
    uint64_t at = random.below(sizes.size()), tries = random.below(8) ? sizes.size() : 0;
    for (; tries; tries--, at = (at + 1) % sizes.size())
        if (sizes[at] == size || sizes[at] == 0) return int32_t(at);
    return -1;
}

/* Sections of all payloads in any order, some of them more than once, some left out. */
Target make_target(const std::vector<std::vector<uint64_t>> &sizes, bool mapped, Random &random) {
    Target target;
    target.divisor = float(random.below(4) ? sizes.size() : 3);
    target.factor = random.below(2) ? 1.0f : random.normal();
    if (!mapped) target.sizes = sizes[0];
    if (!mapped) return target;
    uint64_t left = MOST;
    for (uint64_t count = random.below(sizes[0].size() + 3); count; count--) {
        const std::vector<uint64_t> &some = sizes[random.below(sizes.size())];
        uint64_t size = some.empty() ? random.below(100) : some[random.below(some.size())];
        if (size <= left) target.sizes.push_back(size);
        if (size <= left) left -= size;
    }
    for (const std::vector<uint64_t> &own : sizes)
        for (uint64_t size : target.sizes) target.sections.push_back(pick(own, size, random));
    target.sections.resize(target.sections.size() + 1); /* so that there is a pointer even if there are no segments */
    return target;
}

struct Decoded {
    Outcome outcome;
    Segments segments;
    Bytes broken;
};

Decoded decode(const std::vector<Bytes> &payloads, const qgenx_codebook &book, const Target &target, qgenx_path path) {
    std::vector<const uint8_t *> pointers;
    std::vector<uint64_t> sizes;
    for (const Bytes &payload : payloads) {
        pointers.push_back(payload.data());
        sizes.push_back(payload.size());
    }
    Decoded decoded = {{}, Segments(target.sizes, 0.5f), Bytes(target.sizes.size(), 7)};
    qgenx_target asked = {target.sizes.data(), decoded.segments.pointers.data(),
                          target.sections.empty() ? nullptr : target.sections.data(), uint32_t(target.sizes.size())};
    memory::Watch watch;
    decoded.outcome.status =
        qgenx_decode_mean(&book, pointers.data(), sizes.data(), uint32_t(payloads.size()), &asked, target.divisor,
                          target.factor, decoded.broken.data(), 1, path, decoded.outcome.message);
    memory::check(int64_t(payloads.size()), 1);
    return decoded;
}

bool same(const std::vector<float> &a, const std::vector<float> &b) {
    for (size_t i = 0; i < a.size(); i++)
        if (get<uint32_t>(reinterpret_cast<const uint8_t *>(&a[i])) !=
                get<uint32_t>(reinterpret_cast<const uint8_t *>(&b[i])) &&
            !(std::isnan(a[i]) && std::isnan(b[i])))
            return false;
    return a.size() == b.size();
}

/* The means of what each payload decodes to alone, and whether they are finite; false if one of them does not decode. */
bool expect(const Input &input, const std::vector<std::vector<uint64_t>> &sizes, const Target &target,
            Segments &expected, Bytes &broken) {
    Bytes present(target.sizes.size(), 0);
    for (size_t k = 0; k < input.payloads.size(); k++) {
        Target own;
        own.sizes = sizes[k];
        if (get<uint64_t>(input.payloads[k].data() + At::NUMEL) > MOST) return false;
        Decoded alone = decode({input.payloads[k]}, input.book, own, QGENX_PORTABLE);
        if (alone.outcome.status) return false;
        for (size_t i = 0; i < target.sizes.size(); i++) {
            int32_t section = target.sections.empty() ? int32_t(i) : target.sections[k * target.sizes.size() + i];
            if (section < 0 || own.sizes[size_t(section)] == 0) continue;
            for (size_t j = 0; j < target.sizes[i]; j++) {
                float value = alone.segments.values[size_t(section)][j], &sum = expected.values[i][j];
                sum = present[i] ? sum + value : value;
            }
            present[i] = 1;
        }
    }
    for (size_t i = 0; i < target.sizes.size(); i++)
        for (float &value : expected.values[i]) {
            if (!present[i]) continue;
            value = value / target.divisor * target.factor;
            if (!std::isfinite(value)) broken[i] = 1; /* NaN arrived, or a sum passed the largest float32 */
        }
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    tally.tried++;
    Input input = read_input(data, size);
    qgenx_path best = qgenx_best_path();
    std::vector<std::vector<uint64_t>> sizes;
    bool refused = false;
    for (const Bytes &payload : input.payloads) {
        Outcome parsed = parse(payload, QGENX_PORTABLE);
        check_name(parsed);
        REQUIRE(parsed == parse(payload, best));
        sizes.push_back(parsed.status ? std::vector<uint64_t>{3} : sizes_of(payload));
        refused = refused || parsed.status;
        /* few bytes cannot ask for much: a bucket has a norm */
        if (!parsed.status) REQUIRE(parsed.numel / QGENX_MAX_BUCKET <= payload.size() / 4);
        if (!parsed.status && parsed.numel > MOST && !input.mapped) {
            tally.too_long++;
            return 0;
        }
    }
    Target target = make_target(sizes, input.mapped, input.random);
    Decoded one = decode(input.payloads, input.book, target, QGENX_PORTABLE);
    Decoded two = decode(input.payloads, input.book, target, best);
    check_name(one.outcome);
    REQUIRE(one.outcome == two.outcome);
    REQUIRE(!refused || one.outcome.status);
    tally.rejected += one.outcome.status != QGENX_OK;
    if (one.outcome.status) return 0;
    REQUIRE(same(one.segments.joined(), two.segments.joined()) && one.broken == two.broken);
    Segments expected(target.sizes, 0.5f);
    Bytes broken(target.sizes.size(), 0);
    if (!expect(input, sizes, target, expected, broken)) return 0;
    tally.compared++;
    REQUIRE(same(one.segments.joined(), expected.joined()) && one.broken == broken);
    if (input.payloads.size() > 1 || std::fabs(target.factor) > 1)
        return 0; /* a sum, or its multiple, may exceed float32 */
    for (float value : one.segments.joined()) REQUIRE(!std::isinf(value));
    return 0;
}
