#include "lookup_bench.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "general_tables.hpp"
#include "line_limit.hpp"
#include "memory_copy.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::uint64_t kAdversarialSeed = 99;

// Writes the file's pages to disk and asks the kernel to forget them.
void drop_from_page_cache(const std::filesystem::path& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor >= 0) {
        static_cast<void>(::fdatasync(descriptor));
        static_cast<void>(::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED));
        ::close(descriptor);
    }
}

TokenBatch<std::int32_t> batch_of(const Workload& workload, std::int32_t eod) {
    return {workload.tokens, workload.tokens.size(), {}, eod};
}

}  // namespace

LookupBench::LookupBench(LookupSettings settings, const KeyTable& keys, std::vector<std::int32_t> text)
    : settings_(std::move(settings)), keys_(keys), trie_(keys) {
    const std::size_t positions = text.size();
    workloads_.push_back(make_workload("text", std::move(text), settings_.eod, keys.max_order));
    workloads_.push_back(make_workload("adversarial", adversarial_tokens(keys, positions, kAdversarialSeed),
                                       settings_.eod, keys.max_order));
    rows_.resize(positions);
    orders_.resize(positions);
    const auto plain = general_tables().front().build(trie_.steps());
    for (const Workload& workload : workloads_) {
        plain->lookup(workload, expected_.emplace_back(positions));
    }
}

Json LookupBench::build() {
    Json result;
    if (!settings_.reuse_index || !std::filesystem::exists(settings_.index)) {
        std::filesystem::remove(settings_.index);
        BuildOptions options;
        options.threads = settings_.threads;
        const double start = wall_seconds();
        static_cast<void>(build_index(settings_.index, keys_, settings_.vocab_size, {}, options));
        const double seconds = wall_seconds() - start;
        result.add("seconds", seconds).add("threads", std::uint64_t{settings_.threads});
        result.add("entries_per_second", static_cast<double>(keys_.rows()) / seconds);
    }
    const MappedFile file(settings_.index);
    const IndexHeader header = SuffixIndex(file.bytes()).header();
    result.add("entries", header.rows).add("phantoms", header.phantoms).add("file_bytes", header.file_bytes);
    const auto file_bytes = static_cast<double>(header.file_bytes);
    return result.add("bytes_per_entry", file_bytes / static_cast<double>(header.rows));
}

Json LookupBench::open() const {
    std::array<std::vector<double>, 2> milliseconds;
    for (std::size_t round = 0; round < settings_.rounds; ++round) {
        for (const bool cold : {false, true}) {
            if (cold) {
                drop_from_page_cache(settings_.index);
            }
            const double start = wall_seconds();
            const MappedFile file(settings_.index);
            const SuffixIndex index(file.bytes());
            milliseconds[cold ? 1 : 0].push_back((wall_seconds() - start) * 1e3);
        }
    }
    return Json()
        .add("in_page_cache_ms", median(milliseconds[0]))
        .add("from_disk_ms", median(milliseconds[1]));
}

Json LookupBench::describe_workloads() const {
    Json result;
    for (std::size_t at = 0; at < workloads_.size(); ++at) {
        const Workload& workload = workloads_[at];
        const auto positions = static_cast<double>(workload.tokens.size());
        std::vector<double> shares(keys_.max_order + 1);
        for (const std::uint8_t order : expected_[at].orders) {
            shares[order] += 1.0 / positions;
        }
        const std::uint64_t probes = trie_.count_probes(workload, expected_[at]);
        Json described;
        described.add("positions", static_cast<std::uint64_t>(workload.tokens.size()));
        described.add("share_by_order", shares);
        described.add("probes_per_position", static_cast<double>(probes) / positions);
        result.add(workload.name, described);
    }
    return result;
}

void LookupBench::compare(const Answers& expected, std::span<const std::int64_t> rows,
                          std::span<const std::uint8_t> orders) {
    for (std::size_t at = 0; at < rows.size(); ++at) {
        const std::int64_t row = expected.rows[at] == kNoRow ? kMiss : std::int64_t{expected.rows[at]};
        mismatches_ += rows[at] != row || orders[at] != expected.orders[at] ? 1U : 0U;
    }
}

double LookupBench::time_index(const SuffixIndex& index, std::size_t workload, bool compare_too) {
    const ThreadPool alone(1);
    const double start = thread_seconds();
    index.lookup(batch_of(workloads_[workload], settings_.eod), Matches{rows_, orders_}, alone);
    const double seconds = thread_seconds() - start;
    if (compare_too) {
        compare(expected_[workload], rows_, orders_);
    }
    return seconds;
}

Json LookupBench::rates(const std::vector<std::vector<double>>& seconds_by_workload) const {
    Json result;
    for (std::size_t at = 0; at < workloads_.size(); ++at) {
        const auto positions = static_cast<double>(workloads_[at].tokens.size());
        result.add(workloads_[at].name + "_mpos_per_s", positions / median(seconds_by_workload[at]) / 1e6);
    }
    return result;
}

Json LookupBench::pages() {
    // One copy at a time: only one then competes for the cache, and memory is bounded.
    const MappedFile file(settings_.index);
    const auto measure = [&](std::span<const std::byte> bytes) {
        const SuffixIndex index(bytes);
        std::vector<double> near;
        std::vector<double> far;
        std::vector<std::vector<double>> seconds(workloads_.size());
        for (std::size_t at = 0; at < workloads_.size(); ++at) {
            static_cast<void>(time_index(index, at, true));  // touches every page that will be measured
        }
        for (std::size_t round = 0; round < settings_.rounds; ++round) {
            const LineTimes times = random_line_times(bytes, settings_.line_reads, round + 1);
            near.push_back(times.near_ns);
            far.push_back(times.far_ns);
            for (std::size_t at = 0; at < workloads_.size(); ++at) {
                seconds[at].push_back(time_index(index, at, false));
            }
        }
        Json result = rates(seconds);
        const LineTimes limit{median(near), median(far)};
        result.add("line_ns", limit.best())
            .add("line_near_ns", limit.near_ns)
            .add("line_far_ns", limit.far_ns);
        for (std::size_t at = 0; at < workloads_.size(); ++at) {
            const auto probes = static_cast<double>(trie_.count_probes(workloads_[at], expected_[at]));
            result.add(workloads_[at].name + "_share_of_limit",
                       probes * limit.best() * 1e-9 / median(seconds[at]));
        }
        return result;
    };
    Json result;
    {
        const MappedFile huge(settings_.index, Pages::kHuge);
        result.add("huge", measure(huge.bytes()));
    }
    {
        const SmallPageCopy small(file.bytes());
        result.add("small", measure(small.bytes()));
    }
    return result.add("file", measure(file.bytes()));
}

Json LookupBench::bodies() {
    constexpr std::array<std::pair<const char*, Body>, 5> kBodies = {{{"auto", Body::kAuto},
                                                                      {"avx512", Body::kAvx512},
                                                                      {"avx2", Body::kAvx2},
                                                                      {"portable", Body::kPortable},
                                                                      {"ungrouped", Body::kPlain}}};
    const MappedFile huge(settings_.index, Pages::kHuge);
    std::vector<std::pair<std::string, SuffixIndex>> indexes;
    for (const auto& [name, body] : kBodies) {
        if (body_available(body)) {
            indexes.emplace_back(name, SuffixIndex(huge.bytes(), kMaxNodes, body));
        }
    }
    std::vector<std::vector<std::vector<double>>> seconds(
        indexes.size(), std::vector<std::vector<double>>(workloads_.size()));
    for (std::size_t round = 0; round < settings_.rounds; ++round) {
        for (std::size_t body = 0; body < indexes.size(); ++body) {
            for (std::size_t at = 0; at < workloads_.size(); ++at) {
                seconds[body][at].push_back(time_index(indexes[body].second, at, round == 0));
            }
        }
    }
    Json result;
    for (std::size_t body = 0; body < indexes.size(); ++body) {
        result.add(indexes[body].first, rates(seconds[body]));
    }
    return result;
}

Json LookupBench::threads() {
    const MappedFile huge(settings_.index, Pages::kHuge);
    const SuffixIndex index(huge.bytes());
    const ThreadPool one(1);
    const ThreadPool many(settings_.threads);
    const auto wall_of = [&](const ThreadPool& pool, std::size_t at) {
        const double start = wall_seconds();
        index.lookup(batch_of(workloads_[at], settings_.eod), Matches{rows_, orders_}, pool);
        return wall_seconds() - start;
    };
    Json result;
    result.add("threads", std::uint64_t{settings_.threads});
    for (std::size_t at = 0; at < workloads_.size(); ++at) {
        std::array<std::vector<double>, 2> seconds;
        for (std::size_t round = 0; round < settings_.rounds + 1; ++round) {
            const double alone = wall_of(one, at);
            const double together = wall_of(many, at);
            if (round == 0) {  // touches every page; not counted
                compare(expected_[at], rows_, orders_);
            } else {
                seconds[0].push_back(alone);
                seconds[1].push_back(together);
            }
        }
        const auto positions = static_cast<double>(workloads_[at].tokens.size());
        result.add(workloads_[at].name + "_one_mpos_per_s", positions / median(seconds[0]) / 1e6);
        result.add(workloads_[at].name + "_many_mpos_per_s", positions / median(seconds[1]) / 1e6);
        result.add(workloads_[at].name + "_speedup", median(seconds[0]) / median(seconds[1]));
    }
    return result;
}

Json LookupBench::tables() {
    const MappedFile huge(settings_.index, Pages::kHuge);
    const SuffixIndex index(huge.bytes());
    Answers answers(rows_.size());
    Json result;
    for (const GeneralTableKind& kind : general_tables()) {
        const double start = thread_seconds();
        const std::unique_ptr<GeneralTable> table = kind.build(trie_.steps());
        const double build_seconds = thread_seconds() - start;
        std::vector<std::vector<double>> ours(workloads_.size());
        std::vector<std::vector<double>> theirs(workloads_.size());
        for (std::size_t round = 0; round < settings_.rounds; ++round) {
            for (std::size_t at = 0; at < workloads_.size(); ++at) {
                ours[at].push_back(time_index(index, at, false));
                const double begin = thread_seconds();
                table->lookup(workloads_[at], answers);
                theirs[at].push_back(thread_seconds() - begin);
                if (round == 0) {
                    const std::vector<std::int64_t> rows(answers.rows.begin(), answers.rows.end());
                    for (std::size_t position = 0; position < rows.size(); ++position) {
                        rows_[position] = answers.rows[position] == kNoRow ? kMiss : rows[position];
                    }
                    compare(expected_[at], rows_, answers.orders);
                }
            }
        }
        Json measured = rates(theirs);
        for (std::size_t at = 0; at < workloads_.size(); ++at) {
            measured.add(workloads_[at].name + "_ratio", median(theirs[at]) / median(ours[at]));
        }
        measured.add("bytes_per_entry", table->bytes() / static_cast<double>(keys_.rows()));
        result.add(kind.name, measured.add("build_seconds", build_seconds));
    }
    return result;
}

void LookupBench::write_answers(const std::filesystem::path& directory) const {
    const MappedFile file(settings_.index);
    const SuffixIndex index(file.bytes());
    const ThreadPool pool(settings_.threads);
    for (const Workload& workload : workloads_) {
        std::vector<std::int64_t> rows(workload.tokens.size());
        std::vector<std::uint8_t> orders(workload.tokens.size());
        index.lookup(batch_of(workload, settings_.eod), Matches{rows, orders}, pool);
        write_array(directory / (workload.name + ".tokens.i32"), workload.tokens);
        write_array(directory / (workload.name + ".rows.i64"), rows);
        write_array(directory / (workload.name + ".orders.u8"), orders);
    }
}

}  // namespace megatron_graft::bench
