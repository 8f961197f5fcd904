// The oracle again, for many positions: one open hash table of whole keys per order, longest first. It shares
// nothing with the index (no trie, no mix, no walk) and is itself checked against oracle.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "keys.hpp"
#include "oracle.hpp"

namespace megatron_graft::testing {

class FastOracle {
  public:
    FastOracle(const KeySet& keys, std::uint64_t vocab_size) : vocab_size_(vocab_size) {
        for (const Key& key : keys.keys()) {
            tables_[key.size()].reserve_one();
        }
        for (Table& table : tables_) {
            table.make();
        }
        for (std::size_t row = 0; row < keys.size(); ++row) {
            const Key& key = keys.keys()[row];
            std::array<Token, kLongest> newest_first{};
            std::reverse_copy(key.begin(), key.end(), newest_first.begin());
            std::uint64_t hash = kStart;
            for (std::size_t age = 0; age < key.size(); ++age) {
                hash = extended(hash, newest_first[age]);
            }
            tables_[key.size()].insert(newest_first, hash, static_cast<std::uint32_t>(row));
            longest_ = std::max(longest_, key.size());
        }
    }

    // Positions [begin, end) of the text; both are multiples of its length.
    void lookup(const Text& text, std::size_t begin, std::size_t end, std::uint64_t row_limit,
                Answer& answer) const {
        for (std::size_t position = begin; position < end; ++position) {
            std::array<Token, kLongest> newest_first{};
            std::array<std::uint64_t, kLongest + 1> hashes{kStart};
            std::size_t available = 0;
            while (available < longest_) {
                const std::int64_t token = text.tokens[position - available];
                if (token < 0 || token >= static_cast<std::int64_t>(vocab_size_) || token == text.eod) {
                    break;
                }
                newest_first[available] = static_cast<Token>(token);
                hashes[available + 1] = extended(hashes[available], newest_first[available]);
                ++available;
                if (text.starts_document(position + 1 - available)) {
                    break;
                }
            }
            answer.rows[position] = -1;
            answer.orders[position] = 0;
            for (std::size_t order = available; order > 0; --order) {
                const std::int64_t row = tables_[order].find(newest_first, order, hashes[order]);
                if (row >= 0 && static_cast<std::uint64_t>(row) < row_limit) {
                    answer.rows[position] = row;
                    answer.orders[position] = static_cast<std::uint8_t>(order);
                    break;
                }
            }
        }
    }

  private:
    static constexpr std::size_t kLongest = 8;
    static constexpr std::uint64_t kStart = 0x243f6a8885a308d3ULL;

    static std::uint64_t extended(std::uint64_t hash, Token token) {
        hash = (hash ^ static_cast<std::uint64_t>(token)) * 0xff51afd7ed558ccdULL;
        return hash ^ (hash >> 29U);
    }

    struct Slot {
        std::array<Token, kLongest> newest_first;
        std::int64_t row;
    };

    class Table {
      public:
        void reserve_one() { ++count_; }
        void make() { slots_.assign(count_ == 0 ? 0 : std::bit_ceil(2 * count_), Slot{{}, -1}); }

        void insert(const std::array<Token, kLongest>& newest_first, std::uint64_t hash, std::uint32_t row) {
            std::size_t place = hash & (slots_.size() - 1);
            while (slots_[place].row >= 0) {
                place = (place + 1) & (slots_.size() - 1);
            }
            slots_[place] = {newest_first, row};
        }

        [[nodiscard]] std::int64_t find(const std::array<Token, kLongest>& newest_first, std::size_t order,
                                        std::uint64_t hash) const {
            if (slots_.empty()) {
                return -1;
            }
            for (std::size_t place = hash & (slots_.size() - 1); slots_[place].row >= 0;
                 place = (place + 1) & (slots_.size() - 1)) {
                if (std::memcmp(slots_[place].newest_first.data(), newest_first.data(),
                                order * sizeof(Token)) == 0) {
                    return slots_[place].row;
                }
            }
            return -1;
        }

      private:
        std::size_t count_ = 0;
        std::vector<Slot> slots_;
    };

    std::uint64_t vocab_size_;
    std::size_t longest_ = 0;
    std::array<Table, kLongest + 1> tables_;
};

}  // namespace megatron_graft::testing
