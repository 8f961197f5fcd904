#include "index_level.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_graft {
namespace {

// Enough slices that a sorted one stays in a core's cache, few enough that scattering into them does too.
constexpr std::size_t kSlices = 512;
constexpr std::size_t kEntriesForSlices = 1U << 16U;

// The upper 32 bits of a mixed key: what homes and slices are chosen by.
std::uint64_t top_of(std::uint64_t mixed, unsigned bits) {
    return (mixed << (64U - bits)) >> 32U;
}

}  // namespace

LevelCollector::LevelCollector(const KeyTable& keys, std::uint32_t order,
                               std::span<const std::uint32_t> parents, unsigned token_bits, unsigned key_bits,
                               const ThreadPool& pool)
    : keys_(keys), order_(order), parents_(parents), token_bits_(token_bits), mix_(key_bits), pool_(pool) {}

std::span<const LevelNode> LevelCollector::collect(std::uint64_t part, std::uint64_t parts,
                                                   std::uint64_t first_phantom,
                                                   std::span<std::uint32_t> children) {
    scatter(part, parts);
    sort_and_count();
    refuse_repeats();
    number(first_phantom, children);
    return nodes_;
}

std::uint64_t LevelCollector::slice_of(std::uint64_t mixed, std::uint64_t slices) const {
    return (top_of(mixed, mix_.bits) * slices) >> 32U;
}

// Every block of rows counts its entries by slice and then writes them where the blocks before it stop, so
// that nothing is shared while threads write.
void LevelCollector::scatter(std::uint64_t part, std::uint64_t parts) {
    const std::size_t rows = keys_.rows();
    const std::size_t blocks = pool_.threads();
    const std::size_t slices = rows < kEntriesForSlices ? 1 : kSlices;
    std::vector<std::vector<std::size_t>> places(blocks, std::vector<std::size_t>(slices, 0));
    const auto visit = [&](std::size_t block, auto&& use) {
        for (std::size_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
            if (keys_.orders[row] < order_) {
                continue;
            }
            const auto token = static_cast<std::uint64_t>(keys_.token(row, order_ - 1));
            const std::uint64_t mixed = mix_key(std::uint64_t{parents_[row]} << token_bits_ | token, mix_);
            const std::uint64_t slice = slice_of(mixed, slices * parts);
            if (slice / slices == part) {
                use(row, mixed, places[block][slice % slices]);
            }
        }
    };
    const auto for_blocks = [&](auto&& use) {
        pool_.for_ranges(blocks, 1, [&](std::size_t begin, std::size_t end) {
            for (std::size_t block = begin; block < end; ++block) {
                visit(block, use);
            }
        });
    };

    for_blocks([](std::size_t, std::uint64_t, std::size_t& place) { ++place; });
    slices_.assign(slices, Slice{});
    std::size_t next = 0;
    for (std::size_t slice = 0; slice < slices; ++slice) {
        slices_[slice].begin = next;
        for (auto& block : places) {
            next += std::exchange(block[slice], next);
        }
        slices_[slice].end = next;
    }
    resize_anew(entries_, next);
    for_blocks([&](std::size_t row, std::uint64_t mixed, std::size_t& place) {
        const bool goes_on = keys_.orders[row] > order_;
        entries_[place++] = {mixed << 1U | std::uint64_t{goes_on}, static_cast<std::uint32_t>(row), 0};
    });
}

void LevelCollector::sort_and_count() {
    pool_.for_ranges(slices_.size(), 1, [&](std::size_t begin, std::size_t end) {
        for (Slice& slice : std::span(slices_).subspan(begin, end - begin)) {
            std::sort(entries_.begin() + static_cast<std::ptrdiff_t>(slice.begin),
                      entries_.begin() + static_cast<std::ptrdiff_t>(slice.end),
                      [](const Entry& left, const Entry& right) {
                          return left.sort_key != right.sort_key ? left.sort_key < right.sort_key
                                                                 : left.row < right.row;
                      });
            count_slice(slice);
        }
    });
}

void LevelCollector::count_slice(Slice& slice) const {
    std::uint64_t previous = ~std::uint64_t{0};
    for (std::size_t index = slice.begin; index < slice.end; ++index) {
        const Entry& entry = entries_[index];
        const bool goes_on = (entry.sort_key & 1U) != 0;
        if (entry.sort_key >> 1U != previous) {
            ++slice.nodes;
            slice.phantoms += goes_on ? 1 : 0;
        } else if (!goes_on && entry.row < slice.repeated_row) {
            slice.repeated_row = entry.row;
            slice.repeats_row = entries_[index - 1].row;
        }
        previous = entry.sort_key >> 1U;
    }
}

void LevelCollector::refuse_repeats() const {
    const auto worst = std::min_element(
        slices_.begin(), slices_.end(),
        [](const Slice& left, const Slice& right) { return left.repeated_row < right.repeated_row; });
    if (worst != slices_.end() && worst->repeated_row != kNoRow) {
        throw std::invalid_argument("row " + std::to_string(worst->repeated_row) +
                                    " repeats the key of row " + std::to_string(worst->repeats_row));
    }
}

void LevelCollector::number(std::uint64_t first_phantom, std::span<std::uint32_t> children) {
    std::vector<std::size_t> first_node(slices_.size());
    std::vector<std::uint64_t> first_id(slices_.size());
    std::size_t nodes = 0;
    phantoms_ = 0;
    for (std::size_t index = 0; index < slices_.size(); ++index) {
        first_node[index] = nodes;
        first_id[index] = first_phantom + phantoms_;
        nodes += slices_[index].nodes;
        phantoms_ += slices_[index].phantoms;
    }
    if (first_phantom + phantoms_ > kMaxNodes) {
        throw std::length_error("suffixes of order " + std::to_string(order_) +
                                " bring rows and phantoms to " + std::to_string(first_phantom + phantoms_) +
                                ", an index has at most " + std::to_string(kMaxNodes) +
                                " of both: it needs fewer or shorter keys");
    }
    resize_anew(nodes_, nodes);
    pool_.for_ranges(slices_.size(), 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t index = begin; index < end; ++index) {
            number_slice(slices_[index], first_node[index], first_id[index], children);
        }
    });
}

void LevelCollector::number_slice(const Slice& slice, std::size_t first_node, std::uint64_t first_phantom,
                                  std::span<std::uint32_t> children) {
    std::size_t next = first_node;
    std::uint64_t phantom = first_phantom;
    for (std::size_t index = slice.begin; index < slice.end; ++index) {
        const Entry& entry = entries_[index];
        const std::uint64_t mixed = entry.sort_key >> 1U;
        const bool goes_on = (entry.sort_key & 1U) != 0;
        if (index == slice.begin || nodes_[next - 1].mixed != mixed) {
            const auto id = goes_on ? static_cast<std::uint32_t>(phantom++) : entry.row;
            nodes_[next++] = {mixed, id, 0};
        }
        if (goes_on) {
            nodes_[next - 1].has_child = 1;
            if (!children.empty()) {
                children[entry.row] = nodes_[next - 1].id;
            }
        }
    }
}

}  // namespace megatron_graft
