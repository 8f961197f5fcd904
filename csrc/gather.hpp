// Copies rows of a bank, by number, into one buffer: the columns of all donor layers side by side.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "body.hpp"
#include "thread_pool.hpp"

namespace megatron_graft {

inline constexpr std::size_t kScaleBytes = 4;

// A run of rows of one donor layer, `row_bytes` bytes each, without gaps; any alignment.
struct RowShard {
    const std::byte* data;
    std::size_t rows;
    std::size_t row_bytes;
    const std::byte* scales = nullptr;  // kScaleBytes for each row, or null if the layer has none
};

// One donor layer: its shards follow one another by row number.
using RowLayer = std::vector<RowShard>;

// The bytes [begin, end) of a layer's row.
struct ByteRange {
    std::size_t begin;
    std::size_t end;
};

// Finds the shard of a row.
class ShardMap {
  public:
    struct Place {
        std::size_t shard;
        std::size_t row;  // within the shard
    };

    // Of one shard or more. Throws std::length_error if all rows together do not fit in 63 bits.
    explicit ShardMap(std::span<const RowShard> shards);

    [[nodiscard]] std::size_t rows() const { return starts_.back(); }

    // `row` is below rows(). Without a division: a table over equal spans of rows leaves a shard or two to
    // compare.
    [[nodiscard]] Place find(std::size_t row) const {
        if (starts_.size() == 2) {
            return {0, row};
        }
        const std::size_t span = row >> shift_;
        const auto first = starts_.begin() + static_cast<std::ptrdiff_t>(firsts_[span]);
        const auto last = starts_.begin() + static_cast<std::ptrdiff_t>(firsts_[span + 1]);
        const auto start = std::upper_bound(first + 1, last + 1, row) - 1;
        return {static_cast<std::size_t>(start - starts_.begin()), row - *start};
    }

  private:
    std::vector<std::size_t> starts_;  // of each shard, then the end of the last
    std::vector<std::size_t> firsts_;  // of each span of 2^shift_ rows: the shard of its first row
    unsigned shift_ = 0;
};

// The rows of a bank, ready to be gathered. Immutable; it does not own the bytes. Safe to use from many
// threads.
//
// A gathered row is: for each layer the bytes of its range, side by side; zeros up to the next multiple of 4;
// if the layers have scales, the scale of each layer, whatever the ranges are.
class RowGatherer {
  public:
    // Throws std::invalid_argument if there is no layer, if layers differ in their rows or in where these are
    // cut into shards, if the shards of a layer differ in row_bytes, or if only some of them have scales;
    // std::length_error if sizes do not fit in 63 bits.
    explicit RowGatherer(std::vector<RowLayer> layers);

    [[nodiscard]] std::size_t layers() const { return layers_.size(); }
    [[nodiscard]] std::size_t rows() const { return places_.rows(); }
    // The ranges that take whole rows.
    [[nodiscard]] std::vector<ByteRange> all_columns() const;
    // Bytes of a gathered row. Throws std::invalid_argument unless there is one range for each layer, inside
    // its row.
    [[nodiscard]] std::size_t bytes_of_row(std::span<const ByteRange> ranges) const;

    // Writes the gathered row of each of `rows` to `out`, [M, bytes_of_row(ranges)]. A negative row gives
    // zeros. Throws, before it writes anything: std::out_of_range for a row that is not there,
    // std::invalid_argument if `ranges` or the size of `out` do not fit or the processor cannot run `body`.
    void gather(std::span<const std::int64_t> rows, std::span<std::byte> out,
                std::span<const ByteRange> ranges, const ThreadPool* pool = nullptr,
                Body body = Body::kAuto) const;

  private:
    [[nodiscard]] bool has_scales() const { return layers_.front().front().scales != nullptr; }
    [[nodiscard]] std::size_t bytes_of_elements(std::span<const ByteRange> ranges) const;

    std::vector<RowLayer> layers_;
    ShardMap places_;
};

}  // namespace megatron_graft
