// Elements spread over many buckets that share one pool of blocks, so that buckets of any sizes fit as long
// as their sum does; and a table that sums up the elements of one bucket.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "huge_memory.hpp"

namespace megatron_graft {

template <typename Element>
class BucketPool {
  public:
    static constexpr std::size_t kBlockBytes = 4096;
    static constexpr std::size_t kPerBlock = kBlockBytes / sizeof(Element);
    static_assert(kPerBlock * sizeof(Element) == kBlockBytes);

    // At least one block. Memory is taken as blocks are used.
    BucketPool(std::size_t buckets, std::size_t blocks)
        : ends_(buckets, nullptr),
          previous_(std::max<std::size_t>(blocks, 1), kNone),
          memory_(previous_.size() * kPerBlock) {}

    // False if no block is left: nothing was added then.
    [[gnu::always_inline]] bool push(std::size_t bucket, const Element& element) {
        Element*& end = ends_[bucket];
        if (reinterpret_cast<std::uintptr_t>(end) % kBlockBytes == 0) [[unlikely]] {
            if (!add_block(bucket)) {
                return false;
            }
        }
        *end++ = element;
        return true;
    }

    // Calls use(std::span<const Element>) for the parts of a bucket, in no particular order.
    template <typename Use>
    void for_parts(std::size_t bucket, Use use) const {
        const Element* end = ends_[bucket];
        if (end == nullptr) {
            return;
        }
        std::size_t block = block_of(end - 1);
        use(std::span<const Element>(start_of(block), end));
        while ((block = previous_[block]) != kNone) {
            use(std::span<const Element>(start_of(block), kPerBlock));
        }
    }

    [[nodiscard]] std::size_t size(std::size_t bucket) const {
        std::size_t total = 0;
        for_parts(bucket, [&](std::span<const Element> part) { total += part.size(); });
        return total;
    }
    [[nodiscard]] bool empty() const { return used_ == 0; }

    void clear() { start(ends_.size()); }
    // Empties it, with so many buckets from now on.
    void start(std::size_t buckets) {
        ends_.assign(buckets, nullptr);
        used_ = 0;
    }

  private:
    static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

    [[gnu::noinline]] bool add_block(std::size_t bucket) {
        if (used_ == previous_.size()) {
            return false;
        }
        Element*& end = ends_[bucket];
        previous_[used_] = end == nullptr ? kNone : static_cast<std::uint32_t>(block_of(end - 1));
        end = memory_.data() + used_++ * kPerBlock;
        return true;
    }
    [[nodiscard]] const Element* start_of(std::size_t block) const {
        return memory_.data() + block * kPerBlock;
    }
    [[nodiscard]] std::size_t block_of(const Element* element) const {
        return static_cast<std::size_t>(element - memory_.data()) / kPerBlock;
    }

    std::vector<Element*> ends_;
    std::vector<std::uint32_t> previous_;  // block of the same bucket that was full before
    std::size_t used_ = 0;
    HugeMemory<Element> memory_;
};

// Sums of amounts by key. Keys are mixed: their low bits are their place.
template <typename Amount>
class SumTable {
  public:
    // Empties it, with room for about so many keys; it grows when there are more.
    void start(std::size_t keys) {
        const std::size_t slots = std::bit_ceil(keys + keys / 2 + 16);
        if (keys_.size() < slots) {
            keys_.resize(slots);
        }
        sums_.assign(slots, 0);
        used_ = 0;
    }

    [[gnu::always_inline]] void add(std::uint64_t key, Amount amount) {
        const std::size_t mask = sums_.size() - 1;
        std::size_t slot = key & mask;
        while (true) {
            if (sums_[slot] == 0) {
                keys_[slot] = key;
                sums_[slot] = amount;
                if (++used_ > sums_.size() / 4 * 3) [[unlikely]] {
                    grow();
                }
                return;
            }
            if (keys_[slot] == key) {
                sums_[slot] += amount;
                return;
            }
            slot = (slot + 1) & mask;
        }
    }

    // Calls use(key, sum) for every key.
    template <typename Use>
    void for_each(Use use) const {
        for (std::size_t slot = 0; slot < sums_.size(); ++slot) {
            if (sums_[slot] != 0) {
                use(keys_[slot], sums_[slot]);
            }
        }
    }
    [[nodiscard]] std::size_t size() const { return used_; }

  private:
    [[gnu::noinline]] void grow() {
        const std::vector<std::uint64_t> keys = keys_;
        const std::vector<Amount> sums = sums_;
        start(sums.size());
        for (std::size_t slot = 0; slot < sums.size(); ++slot) {
            if (sums[slot] != 0) {
                add(keys[slot], sums[slot]);
            }
        }
    }

    std::vector<std::uint64_t> keys_;  // as long as the largest table so far
    std::vector<Amount> sums_;         // 0 where there is no key
    std::size_t used_ = 0;
};

}  // namespace megatron_graft
