// The parts of count_slice(): keys once a document, and runs of combined keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

#include "bucket_pool.hpp"
#include "ngram_count.hpp"

namespace megatron_graft {

// Tells whether a key was seen in this document before.
class DocumentKeys {
  public:
    explicit DocumentKeys(std::uint64_t longest_document);

    // Forgets all keys.
    void start_document();
    // Throws std::length_error if the document is longer than was said.
    bool is_new(std::uint64_t mixed);

  private:
    std::size_t limit_;
    std::size_t used_ = 0;
    std::uint32_t document_ = 1;
    std::vector<std::uint64_t> keys_;
    std::vector<std::uint32_t> documents_;  // in which the slot was filled
};

// Collects mixed keys and writes them as runs, equal ones combined.
class RunWriter {
  public:
    RunWriter(const SliceTask& task, unsigned key_bits);

    [[gnu::always_inline]] void add(std::uint64_t mixed) {
        // Below 2^52 times at most 2^12 shares as a rule; share_of() does it whatever they are.
        const std::size_t share = share_of(mixed, key_bits_, shares_);
        if (!pool_.push(share, mixed)) [[unlikely]] {
            finish_run();
            pool_.push(share, mixed);
        }
    }
    // What is added from now on belongs to this data set.
    void set_data_set(std::uint32_t data_set);
    // Writes what was added as a run, if anything was.
    void finish_run();
    // All is in the file afterwards.
    void finish(SliceFacts& facts);

  private:
    void write_share(std::size_t share);

    unsigned key_bits_;
    std::uint64_t most_of_record_;  // occurrences that fit in a record
    std::uint64_t shares_;
    bool split_runs_;
    std::uint32_t data_set_ = 0;
    BucketPool<std::uint64_t> pool_;
    SumTable<std::uint32_t> table_;
    AppendedFile<std::uint64_t> records_;
    std::vector<Run> runs_;
    double seconds_ = 0;
};

}  // namespace megatron_graft
