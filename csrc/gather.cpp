#include "gather.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "checked.hpp"
#include "copy.hpp"

namespace megatron_graft {
namespace {

// How far ahead of the copy rows are asked for: enough to keep the memory busy (8 KiB and 16 KiB measured
// alike), little enough to stay in the smallest second-level cache.
constexpr std::size_t kAheadBytes = 16384;

constexpr std::size_t kMaxRowsAhead = 64;

// Smaller outputs are stored in the ordinary way: they fit in a second-level cache, where whoever asked for
// so little is about to read them (measured: gathered and read once, twice as fast). Larger ones go past the
// caches, which saves reading every line that is overwritten (at 16 MiB twice as fast; the two are even at 2
// MiB).
constexpr std::size_t kStreamBytes = 1 << 20;

// What is worth waking a thread for: about ten times what waking it takes.
constexpr std::size_t kBytesPerRange = 262144;

void require(bool condition, const char* message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

void check_shard(const RowShard& shard, const RowShard& first) {
    require(shard.row_bytes == first.row_bytes, "the shards of a layer differ in row_bytes");
    require((shard.scales != nullptr) == (first.scales != nullptr), "only some shards have scales");
    static_cast<void>(checked_multiply(shard.rows, shard.row_bytes));  // so that no offset below wraps
}

void check_layers(const std::vector<RowLayer>& layers) {
    require(!layers.empty() && !layers.front().empty(), "there is no layer, or one without shards");
    const RowLayer& cut = layers.front();
    for (const RowLayer& layer : layers) {
        const auto same_rows = [](const RowShard& left, const RowShard& right) {
            return left.rows == right.rows;
        };
        require(std::equal(layer.begin(), layer.end(), cut.begin(), cut.end(), same_rows),
                "layers differ in their rows or in where these are cut into shards");
        require((layer.front().scales != nullptr) == (cut.front().scales != nullptr),
                "only some layers have scales");
        for (const RowShard& shard : layer) {
            check_shard(shard, layer.front());
        }
    }
}

const RowLayer& first_of(const std::vector<RowLayer>& layers) {
    check_layers(layers);
    return layers.front();
}

std::size_t padding_of(std::size_t element_bytes) {
    return (kScaleBytes - element_bytes % kScaleBytes) % kScaleBytes;
}

// Returns whether any row is negative.
bool check_rows(std::span<const std::int64_t> rows, std::size_t count) {
    std::int64_t highest = -1;
    std::int64_t lowest = 0;
    for (const std::int64_t row : rows) {
        highest = std::max(highest, row);
        lowest = std::min(lowest, row);
    }
    if (highest >= 0 && static_cast<std::uint64_t>(highest) >= count) {
        throw std::out_of_range("row " + std::to_string(highest) + " of a bank of " + std::to_string(count) +
                                " rows");
    }
    return lowest < 0;
}

// What the threads of one gather share.
struct Task {
    const std::vector<RowLayer>& layers;
    const ShardMap& places;
    std::span<const std::int64_t> rows;
    std::byte* out;
    std::span<const ByteRange> ranges;
    std::size_t row_bytes;
    std::size_t padding;  // behind the elements of a row
    bool has_scales;
    CopyPiece* copy;
    std::size_t rows_ahead;
    const std::byte* zeros;  // what a negative row holds; null if there is none
};

constexpr std::size_t kNoShard = std::numeric_limits<std::size_t>::max();

ShardMap::Place place_of(const Task& task, std::size_t index) {
    const std::int64_t row = task.rows[index];
    return row < 0 ? ShardMap::Place{kNoShard, 0} : task.places.find(static_cast<std::size_t>(row));
}

const std::byte* elements_of(const Task& task, std::size_t layer, ShardMap::Place place) {
    if (place.shard == kNoShard) {
        return task.zeros;
    }
    const RowShard& shard = task.layers[layer][place.shard];
    return shard.data + place.row * shard.row_bytes + task.ranges[layer].begin;
}

void copy_scales(const Task& task, ShardMap::Place place, ShardMap::Place ahead, std::byte* target) {
    for (const RowLayer& layer : task.layers) {
        if (place.shard == kNoShard) {
            std::memset(target, 0, kScaleBytes);
        } else {
            std::memcpy(target, layer[place.shard].scales + place.row * kScaleBytes, kScaleBytes);
        }
        if (ahead.shard != kNoShard) {
            prefetch_bytes(layer[ahead.shard].scales + ahead.row * kScaleBytes, kScaleBytes);
        }
        target += kScaleBytes;
    }
}

void gather_row(const Task& task, ShardMap::Place place, ShardMap::Place ahead, std::byte* target) {
    for (std::size_t layer = 0; layer < task.layers.size(); ++layer) {
        const std::size_t bytes = task.ranges[layer].end - task.ranges[layer].begin;
        task.copy(target, elements_of(task, layer, place), elements_of(task, layer, ahead), bytes);
        target += bytes;
    }
    for (std::size_t byte = 0; byte < task.padding; ++byte) {
        target[byte] = std::byte{0};
    }
    if (task.has_scales) {
        copy_scales(task, place, ahead, target + task.padding);
    }
}

void prefetch_row(const Task& task, ShardMap::Place place) {
    for (std::size_t layer = 0; layer < task.layers.size(); ++layer) {
        prefetch_bytes(elements_of(task, layer, place), task.ranges[layer].end - task.ranges[layer].begin);
    }
}

void gather_range(const Task& task, std::size_t begin, std::size_t end) {
    std::array<ShardMap::Place, kMaxRowsAhead>
        asked_for;  // a ring of task.rows_ahead places, the oldest at `slot`
    for (std::size_t index = 0; index < std::min(task.rows_ahead, end - begin); ++index) {
        asked_for[index] = place_of(task, begin + index);
        prefetch_row(task, asked_for[index]);
    }
    std::size_t slot = 0;
    for (std::size_t index = begin; index < end; ++index) {
        const ShardMap::Place ahead = place_of(task, std::min(index + task.rows_ahead, end - 1));
        gather_row(task, std::exchange(asked_for[slot], ahead), ahead, task.out + index * task.row_bytes);
        slot = slot + 1 == task.rows_ahead ? 0 : slot + 1;
    }
}

}  // namespace

ShardMap::ShardMap(std::span<const RowShard> shards) : starts_(1, 0) {
    for (const RowShard& shard : shards) {
        starts_.push_back(checked_add(starts_.back(), shard.rows));
    }
    if (rows() > static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max())) {
        throw std::length_error("the number of rows does not fit in 63 bits");
    }
    while (rows() >> shift_ > 4 * shards.size()) {
        ++shift_;
    }
    const auto begin = starts_.begin();
    for (std::size_t span = 0; span <= rows() >> shift_; ++span) {
        const auto next = std::upper_bound(begin, starts_.end() - 1, span << shift_);
        firsts_.push_back(static_cast<std::size_t>(next - begin) - 1);
    }
    firsts_.push_back(shards.size() - 1);
}

RowGatherer::RowGatherer(std::vector<RowLayer> layers)
    : layers_(std::move(layers)), places_(first_of(layers_)) {}

std::vector<ByteRange> RowGatherer::all_columns() const {
    std::vector<ByteRange> ranges;
    for (const RowLayer& layer : layers_) {
        ranges.push_back({0, layer.front().row_bytes});
    }
    return ranges;
}

std::size_t RowGatherer::bytes_of_elements(std::span<const ByteRange> ranges) const {
    require(ranges.size() == layers_.size(), "there is not one range for each layer");
    std::size_t total = 0;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        const ByteRange& range = ranges[layer];
        require(range.begin <= range.end && range.end <= layers_[layer].front().row_bytes,
                "a range is not inside its layer's row");
        total = checked_add(total, range.end - range.begin);
    }
    return total;
}

std::size_t RowGatherer::bytes_of_row(std::span<const ByteRange> ranges) const {
    const std::size_t elements = bytes_of_elements(ranges);
    const std::size_t scales = has_scales() ? checked_multiply(kScaleBytes, layers_.size()) : 0;
    return checked_add(checked_add(elements, padding_of(elements)), scales);
}

void RowGatherer::gather(std::span<const std::int64_t> rows, std::span<std::byte> out,
                         std::span<const ByteRange> ranges, const ThreadPool* pool, Body body) const {
    const std::size_t row_bytes = bytes_of_row(ranges);
    require(checked_multiply(rows.size(), row_bytes) == out.size(),
            "out is not as long as the rows asked for");
    const CopyBody copy = copy_body(body);
    const bool has_misses = check_rows(rows, places_.rows());
    if (out.empty()) {
        return;
    }
    const std::size_t element_bytes = bytes_of_elements(ranges);
    const std::vector<std::byte> zeros(has_misses ? element_bytes : 0);
    const bool streams = out.size() >= kStreamBytes;
    const Task task{
        .layers = layers_,
        .places = places_,
        .rows = rows,
        .out = out.data(),
        .ranges = ranges,
        .row_bytes = row_bytes,
        .padding = padding_of(element_bytes),
        .has_scales = has_scales(),
        .copy = streams ? copy.stream : copy.keep,
        .rows_ahead = std::clamp<std::size_t>(kAheadBytes / row_bytes, 1, kMaxRowsAhead),
        .zeros = zeros.data(),
    };
    const auto run = [&](std::size_t begin, std::size_t end) {
        gather_range(task, begin, end);
        if (streams) {
            finish_streaming();
        }
    };
    if (pool == nullptr) {
        run(0, rows.size());
    } else {
        pool->for_ranges(rows.size(), kBytesPerRange / row_bytes + 1, run);
    }
}

}  // namespace megatron_graft
