// The plainest exact table: 64-bit keys and 32-bit numbers, open addressing. Counting uses it, and it gives
// the answers that every other design is compared with.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "measure.hpp"

namespace megatron_graft::bench {

class NodeTable {
  public:
    static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

    explicit NodeTable(std::size_t entries) : slots_(entries + entries / 2 + 16) {}

    // The key must not be there yet, and all keys ever inserted must be as few as the constructor was told.
    void insert(std::uint64_t key, std::uint32_t number) {
        std::size_t slot = home(key);
        while (slots_[slot].number != kNone) {
            slot = slot + 1 == slots_.size() ? 0 : slot + 1;
        }
        slots_[slot] = {key, number};
    }

    [[nodiscard]] std::uint32_t find(std::uint64_t key) const { return find_from(home(key), key); }
    [[nodiscard]] std::size_t bytes() const { return slots_.size() * sizeof(Slot); }

    // Keys asked for together, so that their slots are fetched side by side.
    template <std::size_t kSize>
    class Group {
      public:
        void clear() { size_ = 0; }
        void ask(const NodeTable& table, std::uint64_t key) {
            keys_[size_] = key;
            homes_[size_] = table.home(key);
            __builtin_prefetch(&table.slots_[homes_[size_]]);
            ++size_;
        }
        [[nodiscard]] std::uint32_t answer(const NodeTable& table, std::size_t index) const {
            return table.find_from(homes_[index], keys_[index]);
        }

      private:
        std::array<std::uint64_t, kSize> keys_;
        std::array<std::size_t, kSize> homes_;
        std::size_t size_ = 0;
    };

  private:
    struct Slot {
        std::uint64_t key = 0;
        std::uint32_t number = kNone;
    };

    [[nodiscard]] std::size_t home(std::uint64_t key) const { return scale_to(scatter(key), slots_.size()); }
    [[nodiscard]] std::uint32_t find_from(std::size_t slot, std::uint64_t key) const {
        while (slots_[slot].number != kNone && slots_[slot].key != key) {
            slot = slot + 1 == slots_.size() ? 0 : slot + 1;
        }
        return slots_[slot].number;
    }

    std::vector<Slot> slots_;
};

}  // namespace megatron_graft::bench
