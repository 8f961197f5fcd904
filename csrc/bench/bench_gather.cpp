// Measures the gather of rows against copying as many bytes in sequence, and removing duplicates. Prints one
// JSON object. Every round measures everything once, so that what slows the machine for a while slows all of
// it; figures are medians over the rounds, in bytes a second: of wall time, and of the processor time of an
// average thread, which does not count what other processes took.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "../copy.hpp"
#include "../gather.hpp"
#include "../unique_rows.hpp"
#include "measure.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::size_t kRangeBytes = 4 << 20;  // what a thread copies at a time, in the limits
constexpr std::size_t kAheadBytes = 16384;
constexpr std::size_t kUniqueRows = 32768;  // positions of a micro-batch

// Anonymous memory for which huge pages are asked, all of it touched.
class FilledMemory {
  public:
    explicit FilledMemory(std::size_t size) : size_(size) {
        void* const address =
            ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (address == MAP_FAILED) {
            throw std::system_error(errno, std::generic_category(), "memory for rows");
        }
        static_cast<void>(::madvise(address, size, MADV_HUGEPAGE));
        data_ = static_cast<std::byte*>(address);
        for (std::size_t at = 0; at + sizeof(std::uint64_t) <= size; at += sizeof(std::uint64_t)) {
            const std::uint64_t word = scatter(at);
            std::memcpy(data_ + at, &word, sizeof(word));
        }
    }
    ~FilledMemory() { ::munmap(data_, size_); }
    FilledMemory(const FilledMemory&) = delete;
    FilledMemory& operator=(const FilledMemory&) = delete;

    [[nodiscard]] std::span<std::byte> bytes() const { return {data_, size_}; }

  private:
    std::byte* data_;
    std::size_t size_;
};

double process_seconds() {
    timespec time{};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// The seconds that something took in each round.
struct Timing {
    std::vector<double> wall;
    std::vector<double> processor;  // of an average thread

    void measure(unsigned threads, const std::function<void()>& body) {
        const double wall_start = wall_seconds();
        const double processor_start = process_seconds();
        body();
        processor.push_back((process_seconds() - processor_start) / threads);
        wall.push_back(wall_seconds() - wall_start);
    }
};

struct Rate {
    double wall;
    double processor;

    Rate(std::size_t bytes, const Timing& timing)
        : wall(static_cast<double>(bytes) / median(timing.wall)),
          processor(static_cast<double>(bytes) / median(timing.processor)) {}

    [[nodiscard]] Json json() const {
        return Json().add("bytes_per_second", wall).add("bytes_per_thread_second", processor);
    }
};

// Rows of `row_bytes` elements, and a scale behind each if `scaled`, at positions drawn in one of two ways.
struct Case {
    std::size_t row_bytes;
    bool zipf;
    bool scaled;

    [[nodiscard]] std::string name() const {
        return std::to_string(row_bytes) + (scaled ? "+scale" : "") + (zipf ? " zipf" : " uniform");
    }
    [[nodiscard]] std::size_t bytes_of_row() const { return row_bytes + (scaled ? kScaleBytes : 0); }
};

constexpr Case kCases[] = {{1024, false, false}, {2048, false, false}, {4096, false, false},
                           {1024, true, false},  {2048, true, false},  {4096, true, false},
                           {1024, false, true}};

// Uniform, or by Zipf's law with exponent 1, scattered over the rows.
std::vector<std::int64_t> draw_rows(std::size_t count, std::uint64_t rows, bool zipf) {
    std::vector<std::int64_t> drawn(count);
    for (std::size_t at = 0; at < count; ++at) {
        const std::uint64_t random = scatter(at * 7 + rows + (zipf ? 1 : 0));
        std::uint64_t row = scale_to(random, rows);
        if (zipf) {
            const double fraction = static_cast<double>(random >> 11U) * 0x1p-53;
            const double rank = std::pow(static_cast<double>(rows), fraction) - 1;
            row = scale_to(scatter(static_cast<std::uint64_t>(rank) + 1), rows);
        }
        drawn[at] = static_cast<std::int64_t>(row);
    }
    return drawn;
}

class GatherBench {
  public:
    GatherBench(std::size_t source_bytes, std::size_t output_bytes, std::size_t rounds)
        : source_(source_bytes), output_(output_bytes), rounds_(rounds) {}

    Json measure(unsigned threads) {
        const ThreadPool pool(threads);
        std::map<std::string, Timing> timings;
        for (std::size_t round = 0; round < rounds_; ++round) {
            measure_copies(pool, round, timings);
            for (const Case& which : kCases) {
                measure_case(pool, which, timings);
            }
        }
        return describe(timings);
    }

    // Nanoseconds a row to remove duplicates.
    Json measure_unique() const {
        Json result;
        for (const bool zipf : {false, true}) {
            const std::vector<std::int64_t> rows =
                draw_rows(kUniqueRows, source_.bytes().size() / 2048, zipf);
            std::vector<std::int64_t> unique(rows.size());
            std::vector<std::int32_t> inverse(rows.size());
            std::vector<double> seconds;
            std::size_t count = 0;
            for (std::size_t round = 0; round < 20 * rounds_; ++round) {
                const double start = thread_seconds();
                count = unique_rows(rows, unique, inverse);
                seconds.push_back(thread_seconds() - start);
            }
            const auto length = static_cast<double>(rows.size());
            result.add(zipf ? "zipf" : "uniform", Json()
                                                      .add("rows", std::uint64_t{rows.size()})
                                                      .add("unique", static_cast<double>(count) / length)
                                                      .add("ns_per_row", median(seconds) / length * 1e9));
        }
        return result;
    }

    // Rows that were not gathered as one memcpy a row gives them.
    [[nodiscard]] std::uint64_t mismatches() const { return mismatches_; }

  private:
    // The same bytes in sequence, in the ways a copy can be fast: the limit is the best of them.
    void measure_copies(const ThreadPool& pool, std::size_t round, std::map<std::string, Timing>& timings) {
        const std::size_t size = output_.bytes().size();
        const std::byte* const from =
            source_.bytes().data() + round * size % (source_.bytes().size() - size + 1);
        std::byte* const to = output_.bytes().data();
        const auto copy = [&](const std::string& name,
                              const std::function<void(std::size_t, std::size_t)>& piece) {
            timings[name].measure(pool.threads(), [&] {
                pool.for_ranges(size / kAheadBytes, kRangeBytes / kAheadBytes,
                                [&](std::size_t begin, std::size_t end) {
                                    piece(begin * kAheadBytes, (end - begin) * kAheadBytes);
                                    finish_streaming();
                                });
            });
        };
        CopyPiece* const stream = copy_body(Body::kAuto).stream;
        copy("copy memcpy",
             [&](std::size_t at, std::size_t bytes) { std::memcpy(to + at, from + at, bytes); });
        copy("copy stream",
             [&](std::size_t at, std::size_t bytes) { stream(to + at, from + at, from + at, bytes); });
        copy("copy stream ahead", [&](std::size_t at, std::size_t bytes) {
            for (const std::size_t end = at + bytes; at < end; at += kAheadBytes) {
                const std::size_t ahead = at + kAheadBytes < end ? at + kAheadBytes : at;
                stream(to + at, from + at, from + ahead, kAheadBytes);
            }
        });
    }

    void measure_case(const ThreadPool& pool, const Case& which, std::map<std::string, Timing>& timings) {
        const std::size_t stored_bytes = which.bytes_of_row();  // scales stand behind the rows
        const std::size_t rows = source_.bytes().size() / stored_bytes;
        const std::size_t count = output_.bytes().size() / stored_bytes;
        const std::vector<std::int64_t> wanted = draw_rows(count, rows, which.zipf);
        RowShard shard{source_.bytes().data(), rows, which.row_bytes};
        shard.scales = which.scaled ? shard.data + rows * which.row_bytes : nullptr;
        const RowGatherer gatherer({{shard}});
        const std::span<std::byte> out = output_.bytes().first(count * stored_bytes);
        timings["memcpy " + which.name()].measure(pool.threads(), [&] {
            pool.for_ranges(count, kRangeBytes / stored_bytes, [&](std::size_t begin, std::size_t end) {
                for (std::size_t at = begin; at < end; ++at) {
                    copy_row(shard, static_cast<std::size_t>(wanted[at]), out.data() + at * stored_bytes);
                }
            });
        });
        const std::vector<ByteRange> columns = gatherer.all_columns();
        timings["gather " + which.name()].measure(pool.threads(),
                                                  [&] { gatherer.gather(wanted, out, columns, &pool); });
        std::vector<std::byte> expected(stored_bytes);
        for (std::size_t at = 0; at < count; ++at) {
            copy_row(shard, static_cast<std::size_t>(wanted[at]), expected.data());
            mismatches_ +=
                std::memcmp(expected.data(), out.data() + at * stored_bytes, stored_bytes) != 0 ? 1 : 0;
        }
        // So that rows left over from this measurement cannot pass for those of the next.
        std::memset(out.data(), 0, out.size());
    }

    static void copy_row(const RowShard& shard, std::size_t row, std::byte* target) {
        std::memcpy(target, shard.data + row * shard.row_bytes, shard.row_bytes);
        if (shard.scales != nullptr) {
            std::memcpy(target + shard.row_bytes, shard.scales + row * kScaleBytes, kScaleBytes);
        }
    }

    [[nodiscard]] Json describe(const std::map<std::string, Timing>& timings) const {
        const std::size_t size = output_.bytes().size();
        Json copies;
        double limit = 0;
        double processor_limit = 0;
        for (const char* const name : {"memcpy", "stream", "stream ahead"}) {
            const Rate rate(size / kAheadBytes * kAheadBytes, timings.at("copy " + std::string(name)));
            limit = std::max(limit, rate.wall);
            processor_limit = std::max(processor_limit, rate.processor);
            copies.add(name, rate.json());
        }
        Json cases;
        for (const Case& which : kCases) {
            const std::size_t bytes = size / which.bytes_of_row() * which.bytes_of_row();
            const Rate gather(bytes, timings.at("gather " + which.name()));
            const Rate plain(bytes, timings.at("memcpy " + which.name()));
            cases.add(which.name(), Json()
                                        .add("gather", gather.json())
                                        .add("memcpy_per_row", plain.json())
                                        .add("share_of_copy_limit", gather.wall / limit)
                                        .add("share_of_copy_limit_thread", gather.processor / processor_limit)
                                        .add("times_memcpy_per_row", gather.wall / plain.wall));
        }
        return Json().add("copies", copies).add("copy_limit", limit).add("gathers", cases);
    }

    FilledMemory source_;
    FilledMemory output_;
    std::size_t rounds_;
    std::uint64_t mismatches_ = 0;
};

int run(const Flags& flags) {
    const std::size_t source_bytes = flags.number("source-bytes", std::uint64_t{1} << 30U);
    const std::size_t output_bytes = flags.number("output-bytes", std::uint64_t{1} << 28U);
    const std::size_t rounds = flags.number("rounds", 5);
    const auto threads = static_cast<unsigned>(flags.number("threads", 2));
    if (rounds == 0 || output_bytes < kAheadBytes || output_bytes > source_bytes) {
        throw std::invalid_argument("expected rounds > 0 and 16384 <= output-bytes <= source-bytes");
    }
    GatherBench bench(source_bytes, output_bytes, rounds);
    Json by_threads;
    by_threads.add("1", bench.measure(1));
    if (threads > 1) {
        by_threads.add(std::to_string(threads), bench.measure(threads));
    }
    Json result;
    result.add("source_bytes", std::uint64_t{source_bytes}).add("output_bytes", std::uint64_t{output_bytes});
    result.add("rounds", std::uint64_t{rounds})
        .add("threads", by_threads)
        .add("unique", bench.measure_unique());
    result.add("mismatches", bench.mismatches());
    std::printf("%s\n", result.text().c_str());
    return 0;
}

}  // namespace
}  // namespace megatron_graft::bench

int main(int count, char** words) {
    constexpr std::string_view kFlags[] = {"source-bytes", "output-bytes", "rounds", "threads"};
    try {
        return megatron_graft::bench::run(megatron_graft::bench::Flags(count, words, kFlags));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
