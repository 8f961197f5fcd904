// Exact counts of the n-grams of one order: slices of a corpus are counted apart (count_slice), and what they
// found is summed up partition by partition (sum_partition).
//
// An n-gram is counted only where both of its (n-1)-grams were kept; nothing else can be frequent enough.
// What passes from one to the other is runs: files of records, each a mixed key and a number of occurrences
// in one 64-bit word, in `shares` equal ranges of mixed keys one after the other. A partition is whole
// shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kept_table.hpp"
#include "token_stream.hpp"

namespace megatron_graft {

inline constexpr std::uint64_t kMaxShares = 1U << 16U;

struct SliceTask {
    unsigned order;  // of the n-grams to count, 2 to 8
    std::vector<CorpusPiece> pieces;
    std::uint32_t vocab_size;           // at most 2^20
    std::optional<std::uint32_t> eod;   // in no n-gram
    std::vector<KeptFile> kept;         // n-grams of order - 1; none for order 2
    std::uint64_t kept_parents = 0;     // how many were kept of order - 2 (of order 1: vocab_size)
    std::filesystem::path lower_nodes;  // u32 node of order - 2 by position; only for order 4 and more
    std::filesystem::path nodes;        // where nodes of order - 1 are written; none for order 2
    bool keep_nodes = true;             // otherwise they are written only as far as passes need them
    std::filesystem::path runs;
    std::uint64_t shares;
    bool split_runs = false;  // a run has n-grams of one data set
    // 0: every occurrence counts; otherwise an n-gram counts once a document, and no document is longer.
    std::uint64_t longest_document = 0;
    std::uint64_t pool_blocks;         // of 4 KiB: keys that wait for being counted
    std::uint64_t table_entries;       // kept n-grams in memory at a time
    std::size_t block_tokens = 32768;  // of the corpus in memory at a time
};

struct Run {
    std::uint32_t data_set;
    std::vector<std::uint64_t> begins;  // record of the file at which each share begins; and the end
};

struct SliceFacts {
    std::uint64_t tokens = 0;
    std::uint64_t candidates = 0;  // n-grams counted, with repetitions
    std::uint64_t records = 0;
    std::uint64_t passes = 0;  // over the corpus
    double node_seconds = 0;   // of all but the last pass
    double merge_seconds = 0;  // for combining equal keys and writing runs
    std::vector<Run> runs;
};

// Throws TokenOutOfRange, FormatError for files that do not fit each other, std::system_error,
// std::invalid_argument and std::length_error for a task that cannot be.
SliceFacts count_slice(const SliceTask& task);

// The records of one partition in one run.
struct RunPart {
    std::filesystem::path path;
    std::uint64_t units;                // that an occurrence counts
    std::vector<std::uint64_t> begins;  // by share of the partition, and the end
};

struct PartitionTask {
    std::uint64_t parents;  // how many were kept of order - 1 (of order 1: the size of the vocabulary)
    std::vector<RunPart> parts;
    std::uint64_t shares;       // of all partitions
    std::uint64_t first_share;  // of this one
    std::uint64_t min_units;
    std::uint64_t units_of_count;  // a count is a number of units divided by this, rounded, at least 1
    std::filesystem::path keys;    // where u64 keys are written, ascending by mix
    std::filesystem::path counts;  // where their u64 counts are written
    std::uint64_t pool_blocks;     // of 4 KiB: records in memory
};

struct PartitionFacts {
    std::uint64_t records = 0;
    std::uint64_t distinct = 0;
    std::uint64_t kept = 0;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> histogram;  // count, how many have it; ascending
};

// Throws as count_slice() does.
PartitionFacts sum_partition(const PartitionTask& task);

// How many bits of a record are left for the number of occurrences.
inline unsigned record_count_bits(unsigned key_bits) {
    return 64 - key_bits < 32 ? 64 - key_bits : 32;
}

}  // namespace megatron_graft
