// Exact counts of all n-grams of a text, level by level, with exact 64-bit keys.
//
// Frequent n-grams of a level are numbered: they are its nodes (tokens are the nodes of level 1). The key of
// an n-gram is the pair (node of its newest n - 1 tokens, oldest token), so keys never collide, and an n-gram
// is only counted where both of its (n-1)-grams are frequent: no other can be.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "../thread_pool.hpp"

namespace megatron_graft::bench {

inline constexpr unsigned kKeyTokenBits = 20;

struct CountedLevel {
    std::vector<std::uint64_t> keys;    // node of the newest n - 1 tokens << kKeyTokenBits | oldest token
    std::vector<std::uint32_t> counts;  // of the n-gram whose node is the place here
};

struct CountOptions {
    unsigned max_order = 5;                                            // levels 2 to max_order are counted
    std::uint32_t min_count = 2;                                       // rarer n-grams are dropped
    std::function<void(unsigned order, const CountedLevel&)> counted;  // told after each level
};

// `tokens` are in [0, 2^kKeyTokenBits); no n-gram holds a token equal to `eod`.
// Throws std::length_error if a level has 2^32 nodes or more.
std::vector<CountedLevel> count_levels(std::span<const std::int32_t> tokens, std::int32_t eod,
                                       const CountOptions& options, const ThreadPool& pool);

// A bank's keys in canonical order: count descending, order ascending, ids ascending.
struct CanonicalKeys {
    std::vector<std::int32_t> ids;  // [N, max_order], right-aligned, -1 left of a shorter key
    std::vector<std::uint8_t> orders;
    std::vector<std::uint32_t> counts;
};

// Throws std::length_error if counts and tokens are too large to be sorted as 128-bit numbers.
CanonicalKeys canonical_keys(const std::vector<CountedLevel>& levels, std::uint32_t vocab_size,
                             const ThreadPool& pool);

}  // namespace megatron_graft::bench
