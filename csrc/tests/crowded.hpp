// Bigrams made to collide: the mix of their keys is undone, so that any home and any remainder can be had.
#pragma once

#include <cstddef>
#include <cstdint>

#include "keys.hpp"
#include "mixed_key.hpp"

namespace megatron_graft::testing {

// The vocabulary that all of this is about: two ids of 20 bits make a key of 40.
inline constexpr std::uint64_t kLargestVocabulary = 1ULL << 20U;

// The bigram of two 20-bit ids that mixes to `mixed`: the mix undone, step by step.
inline Key unmixed_pair(std::uint64_t mixed) {
    constexpr std::uint64_t kMask = (std::uint64_t{1} << 40U) - 1;
    const auto undo_product = [](std::uint64_t value, std::uint64_t factor) {
        std::uint64_t inverse = factor;  // right in its low 3 bits; every round doubles that
        for (int round = 0; round < 5; ++round) {
            inverse *= 2 - factor * inverse;
        }
        return value * inverse & kMask;
    };
    std::uint64_t key = mixed ^ mixed >> 20U;
    key = undo_product(key, 0xd6e8feb86659fd93ULL);
    key ^= key >> 20U;
    key = undo_product(key, 0x9e3779b97f4a7c15ULL);
    key ^= key >> 20U;
    return {static_cast<Token>(key & 0xfffffU), static_cast<Token>(key >> 20U)};
}

inline std::uint64_t mixed_pair(const Key& key) {
    return mix_key(static_cast<std::uint64_t>(key[1]) << 20U | static_cast<std::uint64_t>(key[0]),
                   KeyMix(40));
}

// Pairs that all want to live in bucket `home` of 2^14, spread over it.
inline KeySet crowded_pairs(std::size_t count, std::uint64_t home) {
    Random random(28);
    KeySet keys;
    while (keys.size() < count) {
        keys.add(unmixed_pair(home << 26U | random.below(1U << 26U)));
    }
    return keys;
}

}  // namespace megatron_graft::testing
