// From the key of an n-gram to its node, over as much of an order as memory holds at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "counted_key.hpp"
#include "huge_memory.hpp"
#include "positioned_file.hpp"

namespace megatron_graft {

// The keys of one partition of an order: u64, ascending by their mix, all above those of the partition
// before.
struct KeptFile {
    std::filesystem::path path;
    std::uint64_t entries;
};

// Keys are sorted by mix, so the upper bits of a mix lead to a short range of entries, whose lower bits (32
// at most) are all that is stored; the place of an entry is its node. That is 5 bytes for an n-gram.
class KeptTable {
  public:
    // `parents` nodes are below the keys. At most `max_entries` are in memory at a time, rounded up to those
    // that share their upper bits.
    KeptTable(std::vector<KeptFile> files, std::uint64_t parents, std::uint64_t max_entries);

    // Bytes of a table with so many entries of `total`.
    static std::uint64_t bytes_for(std::uint64_t entries, std::uint64_t total, std::uint64_t parents);

    // Puts the next range of keys in place of the present one; false if there is none left. Throws
    // FormatError if keys are not ascending.
    bool load_next();
    [[nodiscard]] bool is_last() const { return next_bucket_ == buckets_; }
    [[nodiscard]] const KeyMix& mix() const { return mix_; }

    // For every mixed key of the range in memory writes nodes[places[i]]: its node or kNoNode. Where the key
    // is of another range nothing is written.
    void find(std::span<const std::uint64_t> mixed, std::span<const std::uint32_t> places,
              std::span<std::uint32_t> nodes) const;

  private:
    static constexpr std::size_t kGroup = 128;
    static constexpr std::uint32_t kSideBySide = 8;  // entries compared without a branch

    static unsigned bucket_bits(std::uint64_t total, unsigned key_bits);
    static std::uint64_t buckets_for(std::uint64_t entries, std::uint64_t total, unsigned key_bits);
    std::size_t read_ahead();
    [[nodiscard]] std::string place_of(std::uint64_t entry) const;
    [[nodiscard]] std::uint32_t find_in(std::uint32_t begin, std::uint32_t end, std::uint32_t rest) const;
    void find_group(const std::uint64_t* mixed, const std::uint32_t* places, std::size_t count,
                    std::uint32_t* nodes) const;

    std::vector<KeptFile> files_;
    std::uint64_t total_;
    std::uint64_t max_entries_;
    KeyMix mix_;
    unsigned rest_bits_;  // of a mix, below those of its bucket
    std::uint64_t buckets_;

    std::uint64_t cursor_ = 0;  // first entry that was in no range yet
    std::uint64_t base_ = 0;    // first entry of the range in memory
    std::uint64_t next_bucket_ = 0;
    std::uint64_t first_bucket_ = 0;
    std::size_t range_buckets_ = 0;
    HugeMemory<std::uint32_t> begins_;  // by bucket of the range, and one more: first entry after base_
    HugeMemory<std::uint32_t> rests_;   // by entry, and kSideBySide more
};

}  // namespace megatron_graft
