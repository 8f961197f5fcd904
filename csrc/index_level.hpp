// One order's nodes while an index is built: from all keys long enough to have such a suffix, the distinct
// suffixes in the order of their mixed keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "index_builder.hpp"
#include "index_format.hpp"
#include "mixed_key.hpp"
#include "thread_pool.hpp"

namespace megatron_graft {

// A distinct suffix. `mixed` is its mixed key.
struct LevelNode {
    std::uint64_t mixed;
    std::uint32_t id;
    std::uint32_t has_child;  // 0 or 1
};

// Gives a vector that many elements, whatever they are. One that has to grow is emptied first: the old
// elements are of no use, and would be in memory a second time while they are copied.
template <typename Vector>
void resize_anew(Vector& elements, std::size_t size) {
    if (size > elements.capacity()) {
        elements = Vector();
    }
    elements.resize(size);
}

// What the keys say about one order, collected a share of the mixed keys at a time so that memory is bounded.
class LevelCollector {
  public:
    // `parents` holds, for every key longer than `order` - 1 tokens, the node of its `order` - 1 newest ones.
    LevelCollector(const KeyTable& keys, std::uint32_t order, std::span<const std::uint32_t> parents,
                   unsigned token_bits, unsigned key_bits, const ThreadPool& pool);

    // Nodes of the share `part` of `parts`, ascending by mixed key. A suffix that is a key has its row as id;
    // the others are phantoms and are numbered from `first_phantom`. Where `children` is not empty, the node
    // of each key longer than `order` is written there, by row. Valid until the next call.
    // Throws std::invalid_argument naming the rows if a key is there twice, std::length_error if there are
    // too many nodes.
    [[nodiscard]] std::span<const LevelNode> collect(std::uint64_t part, std::uint64_t parts,
                                                     std::uint64_t first_phantom,
                                                     std::span<std::uint32_t> children);

    // How many nodes of the last share are phantoms.
    [[nodiscard]] std::uint64_t phantoms() const { return phantoms_; }

  private:
    // A key that has a suffix of this order. `sort_key` is its mixed key with a lowest bit that is 0 if the
    // suffix is the whole key: so the key itself, if there is one, leads the keys that only go on from it.
    struct Entry {
        std::uint64_t sort_key;
        std::uint32_t row;
        std::uint32_t unused;
    };
    static_assert(sizeof(Entry) == sizeof(LevelNode));

    // One slice of the share: entries [begin, end), of which [begin, begin + nodes) become nodes.
    struct Slice {
        std::size_t begin = 0;
        std::size_t end = 0;
        std::size_t nodes = 0;
        std::uint64_t phantoms = 0;
        std::uint64_t repeated_row = kNoRow;
        std::uint64_t repeats_row = 0;
    };

    [[nodiscard]] std::uint64_t slice_of(std::uint64_t mixed, std::uint64_t slices) const;
    void scatter(std::uint64_t part, std::uint64_t parts);
    void sort_and_count();
    void refuse_repeats() const;
    void number(std::uint64_t first_phantom, std::span<std::uint32_t> children);
    void count_slice(Slice& slice) const;
    void number_slice(const Slice& slice, std::size_t first_node, std::uint64_t first_phantom,
                      std::span<std::uint32_t> children);

    const KeyTable& keys_;
    std::uint32_t order_;
    std::span<const std::uint32_t> parents_;
    unsigned token_bits_;
    KeyMix mix_;
    const ThreadPool& pool_;
    std::vector<Slice> slices_;
    std::vector<Entry> entries_;
    std::vector<LevelNode> nodes_;
    std::uint64_t phantoms_ = 0;
};

}  // namespace megatron_graft
