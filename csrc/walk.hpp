// The walk: from a position's newest token to older ones, one order at a time, as long as the index knows the
// suffix. What the bodies below do is the same; they differ in the instructions they may use.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "index_format.hpp"

namespace megatron_graft {

// An index as the walk sees it.
struct WalkTables {
    struct Level {
        const Bucket* buckets;
        std::uint64_t homes;  // how many buckets can be a home; kGuardBuckets more follow
    };
    std::array<Level, kMaxOrder + 1> levels;  // by order; 0 and 1 are not used
    const std::uint32_t* unigrams;            // row of each token, or null
    std::uint32_t max_order;
    unsigned token_bits;
    unsigned key_bits;
    std::uint32_t row_limit;  // an id at or above it is no row: a phantom, or cut off
};

// How many positions one walk takes: its tokens and results stay in the first-level cache.
inline constexpr std::size_t kWalkBlock = 2048;

// Positions to look up. Position p has its newest token at tokens[p * stride] and older ones before it,
// of which it may use reach[p] in all (0 for none, at most the tables' max_order).
struct WalkBlock {
    const std::uint32_t* tokens;
    const std::uint8_t* reach;
    std::size_t stride;
    std::size_t count;  // at most kWalkBlock
    std::int64_t* rows;
    std::uint8_t* orders;
};

using WalkFunction = void (*)(const WalkTables& tables, const WalkBlock& block);

void walk_portable(const WalkTables& tables, const WalkBlock& block);
// One position after the other, nothing fetched ahead: what the others are measured against.
void walk_plain(const WalkTables& tables, const WalkBlock& block);
#if defined(__x86_64__)
void walk_avx2(const WalkTables& tables, const WalkBlock& block);
void walk_avx512(const WalkTables& tables, const WalkBlock& block);
#endif

}  // namespace megatron_graft
