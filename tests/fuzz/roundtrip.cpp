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

/* What a receiver has to get, and what encode has to tell beside, by the symbols that qgenx_quantize draws. */
struct Expected {
    std::vector<float> values;
    Report report;

    Expected(const qgenx_codebook &book, const Job &job, const std::vector<float> &vector, qgenx_path path)
        : report(book, job) {
        std::vector<float> norms(job.buckets());
        std::vector<int8_t> symbols(vector.size() + 1);
        Segments segments(job.sizes, vector);
        char message[QGENX_MESSAGE];
        REQUIRE(qgenx_quantize(&book, &job.layout, &job.encoding, segments.pointers.data(), norms.data(),
                               symbols.data(), 1, path, message) == QGENX_OK);
        report.counts.assign(book.num_levels + 1, 0);
        report.squared_error = report.squared_norm = 0.0;
        const float *norm = norms.data();
        const int8_t *symbol = symbols.data();
        for (size_t segment = 0; segment < job.sizes.size(); segment++)
            add_segment(book, job, segments.values[segment], segment, norm, symbol);
    }

    void add_segment(const qgenx_codebook &book, const Job &job, const std::vector<float> &segment, size_t number,
                     const float *&norm, const int8_t *&symbol) {
        bool raw = segment.size() < job.layout.min_numel, finite = true;
        size_t first = values.size();
        for (float value : segment) finite = finite && std::isfinite(value);
        for (size_t i = 0; i < segment.size(); i++) {
            if (!raw && i && i % job.layout.bucket_size == 0) norm++;
            values.push_back(raw ? (finite ? segment[i] : NAN) : value_of(book, *norm, *symbol));
            if (raw) continue;
            if (*norm != 0 && !std::isnan(*norm)) report.counts[size_t(std::abs(*symbol))]++; /* others have no code */
            symbol++;
        }
        if (!raw && !segment.empty()) norm++;
        report.spoiled[number] = !segment.empty() && std::isnan(values[first]);
        for (size_t i = 0; i < segment.size() && !report.spoiled[number]; i++) {
            double error = double(values[first + i]) - double(segment[i]);
            report.squared_error += error * error;
            report.squared_norm += double(segment[i]) * double(segment[i]);
        }
    }

    static float value_of(const qgenx_codebook &book, float norm, int symbol) {
        REQUIRE(std::abs(symbol) <= int(book.num_levels));
        float magnitude = book.levels[std::abs(symbol)] * norm;
        return symbol < 0 ? -magnitude : magnitude;
    }

    /* Differences are rounded to float32 by the core, so that squares may be off by 2^-23 of themselves, and each of n
     * sums in float64 by 2^-53. */
    void check(const Report &found) const {
        REQUIRE(found.counts == report.counts && found.spoiled == report.spoiled);
        double slack = 0x1p-53 * double(values.size());
        REQUIRE(std::fabs(found.squared_error - report.squared_error) <= (0x1p-23 + slack) * report.squared_error);
        REQUIRE(std::fabs(found.squared_norm - report.squared_norm) <= slack * report.squared_norm);
    }
};

void check_values(const std::vector<float> &decoded, const std::vector<float> &expected) {
    REQUIRE(decoded.size() == expected.size());
    for (size_t i = 0; i < decoded.size(); i++)
        REQUIRE(decoded[i] == expected[i] || (std::isnan(decoded[i]) && std::isnan(expected[i])));
}

int decode_mean(const qgenx_codebook &book, const std::vector<Bytes> &payloads, Segments &segments, const Job &job,
                const int32_t *sections, Bytes &broken, int threads, qgenx_path path) {
    std::vector<const uint8_t *> pointers;
    std::vector<uint64_t> sizes;
    for (const Bytes &payload : payloads) {
        pointers.push_back(payload.data());
        sizes.push_back(payload.size());
    }
    qgenx_target target = {job.sizes.data(), segments.pointers.data(), sections, uint32_t(job.sizes.size())};
    char message[QGENX_MESSAGE];
    return qgenx_decode_mean(&book, pointers.data(), sizes.data(), uint32_t(payloads.size()), &target, 1.0f, 1.0f,
                             broken.data(), threads, path, message);
}

std::vector<float> decode(const qgenx_codebook &book, const Bytes &payload, const Job &job, const Bytes &spoiled,
                          int threads, qgenx_path path) {
    char message[QGENX_MESSAGE];
    Segments segments(job.sizes, 7.0f);
    uint64_t found = 0, numel = segments.joined().size();
    int status = qgenx_parse(payload.data(), payload.size(), int64_t(numel), &found, path, message);
    if (status) fprintf(stderr, "%s\n", message);
    REQUIRE(status == QGENX_OK && found == numel);
    std::vector<Bytes> payloads(1, payload);
    Bytes broken(job.sizes.size(), 7);
    memory::Watch watch;
    REQUIRE(decode_mean(book, payloads, segments, job, nullptr, broken, threads, path) == QGENX_OK);
    memory::check(1, threads);
    if (threads == 1 && memory::most > most) most = memory::most;
    REQUIRE(broken == spoiled);
    return segments.joined();
}

void round_trip(const qgenx_codebook &book, const Job &job, const std::vector<float> &vector, int threads) {
    qgenx_path best = qgenx_best_path();
    Bytes payload = encode(book, job, vector, threads, QGENX_PORTABLE);
    REQUIRE(payload == encode(book, job, vector, threads, best));
    Expected expected(book, job, vector, QGENX_PORTABLE);
    check_values(Expected(book, job, vector, best).values, expected.values);
    Report one(book, job), two(book, job), three(book, job);
    REQUIRE(payload == encode(book, job, vector, threads, QGENX_PORTABLE, &one));
    REQUIRE(payload == encode(book, job, vector, threads, best, &two));
    REQUIRE(payload == encode(book, job, vector, 1, best, &three));
    expected.check(one);
    REQUIRE(one == two && one == three);
    for (qgenx_path path : {QGENX_PORTABLE, best})
        check_values(decode(book, payload, job, one.spoiled, threads, path), expected.values);
}

void statistics(const Job &job, const std::vector<float> &vector, int threads, qgenx_form form) {
    char message[QGENX_MESSAGE];
    Segments segments(job.sizes, vector);
    std::vector<int64_t> found[2];
    for (qgenx_path path : {QGENX_PORTABLE, qgenx_best_path()}) {
        std::vector<int64_t> &bins = found[path];
        bins.assign(2 * QGENX_NUM_BINS + 1, -1);
        int32_t exponent = 0;
        REQUIRE(qgenx_statistics(&job.layout, qgenx_norm(job.encoding.norm), segments.pointers.data(), form, &exponent,
                                 -1000, bins.data(), bins.data() + QGENX_NUM_BINS, threads, path, message) == QGENX_OK);
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
template <class Call>
void starve(Call call) {
    for (int64_t allocation = 0, failed = 1; failed; allocation++) {
        memory::Watch watch(allocation);
        int status = call();
        failed = memory::left < 0;
        REQUIRE(failed || status == QGENX_OK);
        REQUIRE(status == QGENX_OK || status == QGENX_NO_MEMORY);
    }
}

void starve_all(const qgenx_codebook &book, const Job &job, const std::vector<float> &vector, int threads) {
    char message[QGENX_MESSAGE];
    Bytes payload = encode(book, job, vector, threads, QGENX_PORTABLE),
          room(2 * payload.size() + 4 * vector.size() + 4096), broken(job.sizes.size());
    Segments segments(job.sizes, vector);
    Report report(book, job);
    qgenx_report asked = report.ask();
    const uint8_t *at = payload.data();
    uint64_t size = payload.size(), written = 0;
    starve([&] {
        return qgenx_encode(&book, &job.layout, &job.encoding, segments.pointers.data(), room.data(), room.size(),
                            &written, &asked, threads, qgenx_best_path(), message);
    });
    qgenx_target target = {job.sizes.data(), segments.pointers.data(), nullptr, uint32_t(job.sizes.size())};
    starve([&] {
        return qgenx_decode_mean(&book, &at, &size, 1, &target, 1.0f, 1.0f, broken.data(), threads, qgenx_best_path(),
                                 message);
    });
}

/* Several threads on one payload: all, and with a bucket's code damaged. */
void in_threads(const qgenx_codebook &book) {
    std::vector<float> vector = make_vector(270003, NORMAL);
    Job job({200000, 2, 70001}, 1000, QGENX_LINF, 3, true);
    round_trip(book, job, vector, 3);
    for (qgenx_form form : {QGENX_HISTOGRAM, QGENX_MOMENTS}) statistics(job, vector, 3, form);
    double error = 0, norm = 0;
    qgenx_squared_error(vector.data(), vector.data(), vector.size(), &error, &norm, 3);
    REQUIRE(error == 0 && norm > 0);
    starve_all(book, job, vector, 2);
    Bytes payload = encode(book, job, vector, 3, qgenx_best_path());
    REQUIRE(payload == encode(book, job, vector, 1, qgenx_best_path()));
    /* two payloads, of which one lacks a segment and one has them in another order, give the same by any threads */
    Job other({70001, 200000}, 1000, QGENX_LINF, 3, false);
    std::vector<Bytes> payloads = {payload, encode(book, other, make_vector(270001, SPARSE), 1, QGENX_PORTABLE)};
    const int32_t sections[] = {0, -1, 2, 1, -1, 0};
    std::vector<float> means[3];
    for (int threads : {1, 2, 3}) {
        Segments segments(job.sizes, 7.0f);
        Bytes broken(3, 7);
        REQUIRE(decode_mean(book, payloads, segments, job, sections, broken, threads, qgenx_best_path()) == QGENX_OK);
        REQUIRE(broken == Bytes(3, 0) && segments.values[1] == std::vector<float>(2, 7.0f));
        means[threads - 1] = segments.joined();
    }
    REQUIRE(means[0] == means[1] && means[0] == means[2]);
    for (size_t at = payload.size() / 2; at < payload.size() / 2 + 3000; at++) payload[at] ^= 0xA5;
    sign(payload);
    int status[2];
    for (int path : {0, 1}) {
        Segments segments(job.sizes, 7.0f);
        Bytes broken(3, 7);
        status[path] =
            decode_mean(book, {payload}, segments, job, nullptr, broken, 3, path ? qgenx_best_path() : QGENX_PORTABLE);
    }
    REQUIRE(status[0] == status[1]);
}

}  // namespace

int main() {
    unsigned trips = 0;
    auto trip = [&](const qgenx_codebook &book, uint32_t bucket_size, size_t numel) {
        Job job({numel / 3, 0, numel - numel / 3}, bucket_size, trips / KINDS % 2, numel % 2 ? 5 : 0, trips % 3 != 0);
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
