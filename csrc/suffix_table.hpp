// Exact longest-suffix lookup: for every position of a token sequence, the row of the longest known n-gram
// that ends there.
//
// One open-addressing hash table holds the keys of all orders. The hash of a suffix grows by one token at a
// time, newest first, so one pass over a position's suffix gives the hashes of all its lengths; they are then
// tried from the longest down. A candidate counts as a hit only after its whole key has been compared: hashes
// decide how fast an answer is found, never which one.
//
// Nothing here knows Python. A table does not change once built: any number of threads may look up in it at
// once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace megatron_graft {

inline constexpr std::int64_t kMiss = -1;
inline constexpr std::size_t kMaxOrder = 255;  // an order is stored in one byte

// One sequence of tokens. `document_starts` is empty, or holds a non-zero byte wherever a document starts in
// addition to the first position and to those after an end-of-document token.
template <typename Token>
struct Sequence {
    std::span<const Token> tokens;
    std::span<const std::uint8_t> document_starts;
    std::optional<std::int64_t> eod;
};

// The answers for one sequence, written by position: row (kMiss) and order (0 at a miss).
struct Matches {
    std::span<std::int64_t> rows;
    std::span<std::uint8_t> orders;
};

class SuffixTable {
  public:
    // `key_ids` is [rows, max_order], right-aligned: a key's newest token is in the last column. Both arrays
    // are copied. Throws std::invalid_argument if they disagree with each other, if a key holds a token
    // outside [0, vocab_size) or if a key is there twice; std::length_error if there are too many.
    SuffixTable(std::span<const std::int32_t> key_ids, std::span<const std::uint8_t> key_orders,
                std::int64_t vocab_size);

    // Tokens below 0, at or above the vocabulary size, or equal to eod are part of no n-gram.
    // Throws std::invalid_argument if the spans differ in length.
    template <typename Token>
    void lookup(const Sequence<Token>& sequence, Matches matches) const;

    [[nodiscard]] std::size_t rows() const { return key_orders_.size(); }
    [[nodiscard]] std::size_t max_order() const { return max_order_; }

  private:
    // `tag` is the upper half of the key's hash: it spares most comparisons with another key.
    struct Slot {
        std::uint32_t tag;
        std::uint32_t row;
    };
    struct Match {
        std::int64_t row = kMiss;
        std::size_t order = 0;
    };

    void insert(std::size_t row);

    // The longest key among the suffixes of at most `reach` tokens that end with `*newest`.
    template <typename Token>
    [[nodiscard]] Match longest_match(const Token* newest, std::size_t reach) const;

    // The slot that holds the `order` tokens up to `*newest`, or the empty slot where they would go.
    template <typename Token>
    [[nodiscard]] std::size_t find_slot(std::uint64_t hash, const Token* newest, std::size_t order) const;

    std::size_t max_order_;
    std::int64_t vocab_size_;
    std::vector<std::int32_t> key_ids_;
    std::vector<std::uint8_t> key_orders_;
    std::vector<Slot> slots_;  // a power of two, at most half full
    std::size_t slot_mask_ = 0;
    std::array<bool, kMaxOrder + 1> has_order_{};
};

}  // namespace megatron_graft
