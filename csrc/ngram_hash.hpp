// Hashed n-grams of Engram (arXiv 2601.07372): which rows of a layer's table every position reads.
//
// Of the n-gram of order n that ends at a position, all heads share one mix of its compressed ids, and each
// has a prime of its own: row = offset + mix mod prime. Mixes are those of wrapping 64-bit arithmetic and
// remainders those of rounding down, as in the NumPy definition (megatron_graft/ngram/hashing.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "thread_pool.hpp"

namespace megatron_graft {

// The remainder of division by one number, without dividing.
class Remainder {
  public:
    // Throws std::invalid_argument for a divisor below 2.
    explicit Remainder(std::int64_t divisor);

    // Of any number, from 0 to divisor - 1: the quotient is rounded down.
    [[nodiscard]] std::int64_t of(std::int64_t number) const {
        const auto sign = static_cast<std::uint64_t>(number >> 63);
        // A negative number is -1 - n for an n of 63 bits, whose remainder counts down from divisor - 1.
        const std::uint64_t rest = of_magnitude(static_cast<std::uint64_t>(number) ^ sign);
        return static_cast<std::int64_t>((rest ^ sign) + (sign & divisor_));
    }

  private:
    // The reciprocal is too small by at most 1, hence number * reciprocal / 2^64 too small by less than 1/2
    // for a number below 2^63: the quotient is right or one below, and what is left below 2 * divisor, which
    // is below 2^64.
    [[nodiscard]] std::uint64_t of_magnitude(std::uint64_t number) const {
        __extension__ using Wide = unsigned __int128;
        const auto quotient = static_cast<std::uint64_t>((static_cast<Wide>(number) * reciprocal_) >> 64U);
        const std::uint64_t rest = number - quotient * divisor_;
        return rest - (rest >= divisor_ ? divisor_ : 0);
    }

    std::uint64_t divisor_;
    std::uint64_t reciprocal_;  // floor((2^64 - 1) / divisor)
};

// What the hash of one layer is made of.
struct HashConstants {
    std::span<const std::int32_t> compressed_ids;  // by token id
    std::span<const std::int64_t> multipliers;     // by distance back; as many as the longest n-gram has ids
    std::span<const std::int64_t> primes;          // by order from 2 on, then head
    std::span<const std::int64_t> offsets;         // as many: the first row of each head
    std::int64_t pad;                              // stands where an n-gram reaches too far back
    std::optional<std::int64_t> eod;  // this token ends a document; without one only a sequence ends
};

// The hash of one layer. It does not change: any number of threads may use it at once.
class NgramHash {
  public:
    static constexpr std::size_t kMaxOrder = 8;

    // Copies the constants. Throws std::invalid_argument unless there are 2 to kMaxOrder multipliers, equally
    // many heads for each order and at least one, as many offsets, none negative, primes that a
    // Remainder accepts, and rows of 63 bits.
    explicit NgramHash(const HashConstants& constants);

    // Rows that a position reads.
    [[nodiscard]] std::size_t num_heads() const { return heads_.size(); }

    // Writes num_heads() rows for every token of whole sequences of `length` tokens. No n-gram reaches before
    // its sequence, nor before its document if there is an eod, which is the last token of its document and
    // hashed like any other. Negative tokens are mixed as they are. Throws std::out_of_range for the first
    // token that has no compressed id (some rows may be written then), std::invalid_argument if the spans do
    // not fit each other.
    template <typename Token>
    void rows(std::span<const Token> tokens, std::size_t length, std::span<std::int64_t> rows_out,
              const ThreadPool& pool) const;

  private:
    struct Head {
        Remainder remainder;
        std::int64_t offset;
    };

    template <typename Token>
    void hash_range(std::span<const Token> tokens, std::size_t length, std::size_t begin, std::size_t end,
                    std::int64_t* rows_out) const;
    template <typename Token>
    [[nodiscard]] std::uint64_t compressed(std::span<const Token> tokens, std::size_t place) const;

    std::vector<std::int32_t> compressed_ids_;
    std::vector<std::uint64_t> multipliers_;  // unsigned: a signed product that wraps is undefined
    std::vector<Head> heads_;
    std::size_t heads_of_order_;
    std::uint64_t pad_;
    std::optional<std::int64_t> eod_;
};

}  // namespace megatron_graft
