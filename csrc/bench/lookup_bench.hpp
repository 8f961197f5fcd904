// The measurements of lookup over one set of keys. All answers are compared with those of the plain table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "../mapped_file.hpp"
#include "../suffix_index.hpp"
#include "measure.hpp"
#include "workload.hpp"

namespace megatron_graft::bench {

struct LookupSettings {
    std::filesystem::path index;  // is written, unless it is there and may be reused
    bool reuse_index;
    std::uint64_t vocab_size;
    std::int32_t eod;
    std::size_t rounds;      // of every measurement; medians are reported
    std::size_t line_reads;  // per round
    unsigned threads;        // for building, and for the many-thread figure
};

class LookupBench {
  public:
    LookupBench(LookupSettings settings, const KeyTable& keys, std::vector<std::int32_t> text);

    Json build();
    // How long it takes until an index file can be asked: its pages in the page cache, and not.
    Json open() const;
    Json describe_workloads() const;
    // Lookups and random lines with huge pages, with 4 KiB pages and through the file's own pages.
    Json pages();
    // The same index with each body, and with nothing fetched ahead.
    Json bodies();
    Json threads();
    Json tables();

    // Positions at which any design measured so far gave another answer than the plain table.
    [[nodiscard]] std::uint64_t mismatches() const { return mismatches_; }
    // rows.i64, orders.u8 and tokens.i32 of every workload, for a check by someone else.
    void write_answers(const std::filesystem::path& directory) const;

  private:
    // Thread seconds of one lookup of a whole workload; counts mismatches in the first round.
    double time_index(const SuffixIndex& index, std::size_t workload, bool compare_too);
    void compare(const Answers& expected, std::span<const std::int64_t> rows,
                 std::span<const std::uint8_t> orders);
    Json rates(const std::vector<std::vector<double>>& seconds_by_workload) const;

    LookupSettings settings_;
    const KeyTable& keys_;
    Trie trie_;
    std::vector<Workload> workloads_;
    std::vector<Answers> expected_;
    std::vector<std::int64_t> rows_;
    std::vector<std::uint8_t> orders_;
    std::uint64_t mismatches_ = 0;
};

}  // namespace megatron_graft::bench
