// Keys of a bank as tests make them, and the one source of chance in all C++ tests.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <stdexcept>
#include <vector>

#include "index_builder.hpp"

namespace megatron_graft::testing {

using Token = std::int32_t;
using Key = std::vector<Token>;  // oldest token first

// The same numbers on every machine for a seed (the standard's distributions are not).
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t next() {
        state_ += 0x9e3779b97f4a7c15ULL;
        std::uint64_t value = state_;
        value = (value ^ (value >> 30U)) * 0xbf58476d1ce4e5b9ULL;
        value = (value ^ (value >> 27U)) * 0x94d049bb133111ebULL;
        return value ^ (value >> 31U);
    }
    // Below `bound`, which is positive.
    std::uint64_t below(std::uint64_t bound) { return next() % bound; }
    // From `least` to `most`, both included.
    std::uint64_t between(std::uint64_t least, std::uint64_t most) { return least + below(most - least + 1); }
    bool one_in(std::uint64_t times) { return below(times) == 0; }
    Token token(std::uint64_t vocab_size) { return static_cast<Token>(below(vocab_size)); }
    // Small numbers are frequent, as words of a language are.
    Token frequent_token(std::uint64_t vocab_size) {
        return static_cast<Token>(below(between(1, vocab_size)));
    }

  private:
    std::uint64_t state_;
};

// Distinct keys, in the order in which they were added: a key's row is its place.
class KeySet {
  public:
    // False if the key is there already.
    bool add(const Key& key) {
        if (!rows_.emplace(key, static_cast<std::int64_t>(keys_.size())).second) {
            return false;
        }
        keys_.push_back(key);
        max_order_ = std::max(max_order_, key.size());
        return true;
    }

    [[nodiscard]] std::size_t size() const { return keys_.size(); }
    [[nodiscard]] const std::vector<Key>& keys() const { return keys_; }
    [[nodiscard]] const std::map<Key, std::int64_t>& rows() const { return rows_; }
    [[nodiscard]] std::size_t max_order() const { return max_order_; }
    // How many suffixes of keys, of at least two tokens, are no keys themselves.
    [[nodiscard]] std::size_t phantoms() const {
        std::map<Key, bool> found;
        for (const Key& key : keys_) {
            for (std::size_t order = 2; order < key.size(); ++order) {
                const Key suffix(key.end() - static_cast<std::ptrdiff_t>(order), key.end());
                if (!rows_.contains(suffix)) {
                    found[suffix] = true;
                }
            }
        }
        return found.size();
    }

  private:
    std::vector<Key> keys_;
    std::map<Key, std::int64_t> rows_;
    std::size_t max_order_ = 0;
};

// A KeySet in the form that the builder reads. Columns that hold no token hold -1.
class PackedKeys {
  public:
    explicit PackedKeys(const KeySet& keys) : PackedKeys(keys.keys(), keys.max_order()) {}
    PackedKeys(const std::vector<Key>& keys, std::size_t max_order)
        : ids_(keys.size() * max_order, -1), orders_(keys.size()), max_order_(max_order) {
        for (std::size_t row = 0; row < keys.size(); ++row) {
            const Key& key = keys[row];
            if (key.size() > max_order) {
                throw std::invalid_argument("a key is longer than the table is wide");
            }
            orders_[row] = static_cast<std::uint8_t>(key.size());
            for (std::size_t index = 0; index < key.size(); ++index) {
                ids_[(row + 1) * max_order - key.size() + index] = key[index];
            }
        }
    }

    [[nodiscard]] KeyTable table() const { return {ids_, orders_, max_order_}; }

  private:
    std::vector<std::int32_t> ids_;
    std::vector<std::uint8_t> orders_;
    std::size_t max_order_;
};

}  // namespace megatron_graft::testing
