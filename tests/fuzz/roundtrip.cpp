/* Encode and decode, for the sanitizers: every coder, table of levels, norm and bucket size on vectors of every kind.
 * Both paths must write the same bytes, and read from them what was drawn.
 */
#include "inputs.h"

namespace {

int64_t most = 0; /* bytes held by one decode_mean on one thread */

enum Kind { NORMAL, SPARSE, ZERO, SUBNORMAL, LARGE, NOT_A_NUMBER, INFINITE, KINDS };

std::vector<float> make_vector(size_t numel, Kind kind) {
    Random random{uint64_t(numel) * KINDS + kind};
    std::vector<float> vector(numel);
    for (float &value : vector) {
        value = random.normal();
        if (kind == SPARSE && random.below(40)) value = 0.0f;
        if (kind == ZERO) value = random.below(2) ? 0.0f : -0.0f;
        if (kind == SUBNORMAL) value *= 0x1p-140f;
        if (kind == LARGE) value *= 0x1p127f;
    }
    if (numel && kind == NOT_A_NUMBER) vector[random.below(numel)] = NAN;
    if (numel && kind == INFINITE) vector[random.below(numel)] = -INFINITY;
    return vector;
}

/* What a receiver has to get, by the symbols that qgenx_quantize draws. */
std::vector<float> expected_of(const qgenx_codebook &book, const qgenx_job &job, const std::vector<float> &vector,
                               qgenx_path path) {
    char message[QGENX_MESSAGE];
    uint64_t buckets = 0, coded = 0;
    for (uint32_t segment = 0; segment < job.num_segments; segment++) {
        if (job.sizes[segment] < job.min_numel) continue;
        buckets += (job.sizes[segment] + job.bucket_size - 1) / job.bucket_size;
        coded += job.sizes[segment];
    }
    std::vector<float> norms(buckets), expected;
    std::vector<int8_t> symbols(coded);
    REQUIRE(qgenx_quantize(&book, &job, vector.data(), norms.data(), symbols.data(), 1, path, message) == QGENX_OK);
    size_t bucket = 0, symbol = 0, position = 0;
    for (uint32_t segment = 0; segment < job.num_segments; segment++) {
        uint64_t size = job.sizes[segment];
        bool finite = true;
        for (size_t i = 0; i < size; i++) finite = finite && std::isfinite(vector[position + i]);
        for (uint64_t i = 0; i < size; i++) {
            if (size < job.min_numel) {
                expected.push_back(finite ? vector[position + i] : NAN);
                continue;
            }
            int drawn = symbols[symbol++];
            REQUIRE(std::abs(drawn) <= int(book.num_levels));
            float magnitude = book.levels[std::abs(drawn)] * norms[bucket + i / job.bucket_size];
            expected.push_back(drawn < 0 ? -magnitude : magnitude);
        }
        if (size >= job.min_numel) bucket += (size + job.bucket_size - 1) / job.bucket_size;
        position += size;
    }
    return expected;
}

void check_values(const std::vector<float> &decoded, const std::vector<float> &expected) {
    REQUIRE(decoded.size() == expected.size());
    for (size_t i = 0; i < decoded.size(); i++)
        REQUIRE(decoded[i] == expected[i] || (std::isnan(decoded[i]) && std::isnan(expected[i])));
}

std::vector<float> decode(const qgenx_codebook &book, const Bytes &payload, size_t numel, int threads,
                          qgenx_path path) {
    char message[QGENX_MESSAGE];
    uint64_t found = 0, size = payload.size();
    const uint8_t *at = payload.data();
    int status = qgenx_parse(at, size, int64_t(numel), &found, path, message);
    if (status) fprintf(stderr, "%s\n", message);
    REQUIRE(status == QGENX_OK && found == numel);
    std::vector<float> out(numel, 7.0f);
    memory::Watch watch;
    REQUIRE(qgenx_decode_mean(&book, &at, &size, 1, out.data(), numel, threads, path, message) == QGENX_OK);
    memory::check(1, threads);
    if (threads == 1 && memory::most > most) most = memory::most;
    return out;
}

void round_trip(const qgenx_codebook &book, const qgenx_job &job, const std::vector<float> &vector, int threads) {
    qgenx_path best = qgenx_best_path();
    Bytes payload = encode(book, job, vector, threads, QGENX_PORTABLE);
    REQUIRE(payload == encode(book, job, vector, threads, best));
    std::vector<float> expected = expected_of(book, job, vector, QGENX_PORTABLE);
    check_values(expected_of(book, job, vector, best), expected);
    for (qgenx_path path : {QGENX_PORTABLE, best})
        check_values(decode(book, payload, vector.size(), threads, path), expected);
}

void statistics(const qgenx_job &job, const std::vector<float> &vector, int threads, qgenx_form form) {
    char message[QGENX_MESSAGE];
    std::vector<int64_t> found[2];
    for (qgenx_path path : {QGENX_PORTABLE, qgenx_best_path()}) {
        std::vector<int64_t> &bins = found[path];
        bins.assign(2 * QGENX_NUM_BINS + 1, -1);
        int32_t exponent = 0;
        REQUIRE(qgenx_statistics(&job, vector.data(), form, &exponent, -1000, bins.data(), bins.data() + QGENX_NUM_BINS,
                                 threads, path, message) == QGENX_OK);
        bins.back() = exponent;
    }
    REQUIRE(qgenx_best_path() == QGENX_PORTABLE || found[0] == found[1]);
}

std::vector<qgenx_codebook> make_books() {
    std::vector<qgenx_codebook> books;
    for (uint32_t num_levels : {1u, 3u, 7u, 8u, 15u, 16u, 64u, 127u})
        for (uint32_t coder = QGENX_FIXED; coder <= QGENX_ELIAS_RUNS; coder++) {
            Table table = Table((num_levels + coder) % uint32_t(Table::COUNT));
            if (coder == QGENX_HUFFMAN)
                for (Words words : {Words::SKEWED, Words::RUNS, Words::ONES})
                    books.push_back(make_book(coder, num_levels, table, words));
            books.push_back(make_book(coder, num_levels, table, Words::FLAT));
        }
    return books;
}

/* Every allocation fails in its turn: a status, no crash and no leak. */
void starve(const qgenx_codebook &book, const qgenx_job &job, const std::vector<float> &vector, int threads) {
    char message[QGENX_MESSAGE];
    Bytes payload = encode(book, job, vector, threads, QGENX_PORTABLE),
          room(2 * payload.size() + 4 * vector.size() + 4096);
    std::vector<float> out(vector.size());
    const uint8_t *at = payload.data();
    uint64_t size = payload.size(), written = 0;
    for (int64_t allocation = 0, failed = 1; failed; allocation++) {
        memory::Watch watch(allocation);
        int one = qgenx_encode(&book, &job, vector.data(), room.data(), room.size(), &written, nullptr, threads,
                               qgenx_best_path(), message);
        failed = memory::left < 0;
        REQUIRE(failed || one == QGENX_OK);
        REQUIRE(one == QGENX_OK || one == QGENX_NO_MEMORY);
    }
    for (int64_t allocation = 0, failed = 1; failed; allocation++) {
        memory::Watch watch(allocation);
        int two = qgenx_decode_mean(&book, &at, &size, 1, out.data(), out.size(), threads, qgenx_best_path(), message);
        failed = memory::left < 0;
        REQUIRE(failed || two == QGENX_OK);
        REQUIRE(two == QGENX_OK || two == QGENX_NO_MEMORY);
    }
}

/* Several threads on one payload: all, and with a bucket's code damaged. */
void in_threads(const qgenx_codebook &book) {
    const std::vector<uint64_t> sizes = {200000, 2, 70001};
    std::vector<float> vector = make_vector(270003, NORMAL);
    qgenx_job job = make_job(sizes, 1000, QGENX_LINF, 3, true);
    round_trip(book, job, vector, 3);
    for (qgenx_form form : {QGENX_HISTOGRAM, QGENX_MOMENTS}) statistics(job, vector, 3, form);
    double error = 0, norm = 0;
    qgenx_squared_error(vector.data(), vector.data(), vector.size(), &error, &norm, 3);
    REQUIRE(error == 0 && norm > 0);
    starve(book, job, vector, 2);
    Bytes payload = encode(book, job, vector, 3, qgenx_best_path());
    REQUIRE(payload == encode(book, job, vector, 1, qgenx_best_path()));
    for (size_t at = payload.size() / 2; at < payload.size() / 2 + 3000; at++) payload[at] ^= 0xA5;
    sign(payload);
    char message[QGENX_MESSAGE];
    const uint8_t *data = payload.data();
    uint64_t size = payload.size();
    int status[2];
    for (int path : {0, 1})
        status[path] = qgenx_decode_mean(&book, &data, &size, 1, vector.data(), vector.size(), 3,
                                         path ? qgenx_best_path() : QGENX_PORTABLE, message);
    REQUIRE(status[0] == status[1]);
}

}  // namespace

int main() {
    unsigned trips = 0;
    auto trip = [&](const qgenx_codebook &book, uint32_t bucket_size, size_t numel) {
        const std::vector<uint64_t> sizes = {numel / 3, 0, numel - numel / 3};
        qgenx_job job = make_job(sizes, bucket_size, trips / KINDS % 2, numel % 2 ? 5 : 0, trips % 3 != 0);
        std::vector<float> vector = make_vector(numel, Kind(trips % KINDS));
        round_trip(book, job, vector, 1);
        for (qgenx_form form : {QGENX_HISTOGRAM, QGENX_MOMENTS}) statistics(job, vector, 1, form);
        trips++;
    };
    for (const qgenx_codebook &book : make_books()) {
        for (uint32_t bucket_size : {1u, 64u, 65u, 16384u})
            for (size_t numel : {0, 1, 2, 64, 195, 1001}) trip(book, bucket_size, numel);
        trip(book, 16384, 30000);
    }
    for (const qgenx_codebook &book : {make_book(QGENX_HUFFMAN, 20, Table::EXPONENTIAL, Words::SKEWED),
                                       make_book(QGENX_ELIAS_RUNS, 3, Table::CROWDED, Words::FLAT)})
        in_threads(book);
    fprintf(stderr, "%u round trips; the core held %lld bytes at most to decode a payload\n", trips, (long long)most);
    return 0;
}
