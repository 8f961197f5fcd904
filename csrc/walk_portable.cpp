#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "mixed_key.hpp"
#include "walk.hpp"

namespace megatron_graft {
namespace {

inline std::uint32_t probe(const Bucket& bucket, std::uint32_t word) {
    std::uint32_t seen = 0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
        seen |= static_cast<std::uint32_t>((bucket.words[lane] & ~kHasChild) == word) << lane;
    }
    return seen | static_cast<std::uint32_t>(bucket.words[kLanes - 1] == kEmptyWord) << kLanes;
}

}  // namespace
}  // namespace megatron_graft

#define WALK_TARGET
#include "walk_ring.hpp"

namespace megatron_graft {

void walk_portable(const WalkTables& tables, const WalkBlock& block) {
    walk_in_ring(tables, block);
}

namespace {

// Probes the home bucket and, while it has overflowed, those behind it. 0 if the lane is nowhere.
std::uint32_t find(const Bucket*& bucket, std::uint32_t word) {
    std::uint32_t seen = probe(*bucket, word);
    for (std::uint32_t displacement = 1; seen == 0 && displacement <= kMaxDisplacement; ++displacement) {
        ++bucket;
        seen = probe(*bucket, word | displacement << kRemainderBits);
    }
    return seen & (kNotOverflowed - 1);
}

}  // namespace

void walk_plain(const WalkTables& tables, const WalkBlock& block) {
    const KeyMix mix(tables.key_bits);
    for (std::size_t position = 0; position < block.count; ++position) {
        const std::uint32_t* const newest = block.tokens + position * block.stride;
        const std::uint32_t reach = block.reach[position];
        std::uint32_t row = tables.unigrams != nullptr && reach > 0 ? tables.unigrams[*newest] : kNoRow;
        std::uint8_t longest = row < tables.row_limit ? 1 : 0;
        std::uint32_t node = *newest;
        for (std::uint32_t order = 2; order <= reach; ++order) {
            const WalkTables::Level& level = tables.levels[order];
            const std::uint64_t mixed =
                mix_key(std::uint64_t{node} << tables.token_bits | *(newest - (order - 1)), mix);
            const Bucket* bucket = level.buckets + home_bucket(mixed, mix.bits, level.homes);
            const std::uint32_t seen = find(bucket, remainder_of(mixed));
            if (seen == 0) {
                break;
            }
            const auto lane = static_cast<unsigned>(std::countr_zero(seen));
            node = bucket->ids[lane];
            if (node < tables.row_limit) {
                row = node;
                longest = static_cast<std::uint8_t>(order);
            }
            if ((bucket->words[lane] & kHasChild) == 0) {
                break;
            }
        }
        block.rows[position] = longest != 0 ? std::int64_t{row} : -1;
        block.orders[position] = longest;
    }
}

}  // namespace megatron_graft
