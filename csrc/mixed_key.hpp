// The mix of a key and the bucket it calls home.
//
// A key is the pair (node of the suffix so far, next older token) as one integer of `bits` bits. The mix is a
// bijection on those integers, so a mixed key stands for its key: the upper 32 bits choose the home bucket,
// the low 26 bits are kept in the lane, and where remainder_is_exact() holds the two determine the key.
#pragma once

#include <cstdint>

#include "index_format.hpp"

namespace megatron_graft {

struct KeyMix {
    unsigned bits;
    std::uint64_t mask;

    explicit KeyMix(unsigned key_bits) : bits(key_bits), mask((1ULL << key_bits) - 1) {}
};

// Each step can be undone: a right shift folded in with xor, and a product with an odd number modulo 2^bits.
[[gnu::always_inline]] inline std::uint64_t mix_key(std::uint64_t key, std::uint64_t mask,
                                                    unsigned half_bits) {
    std::uint64_t mixed = key & mask;
    mixed ^= mixed >> half_bits;
    mixed = (mixed * 0x9e3779b97f4a7c15ULL) & mask;
    mixed ^= mixed >> half_bits;
    mixed = (mixed * 0xd6e8feb86659fd93ULL) & mask;
    return mixed ^ (mixed >> half_bits);
}

[[gnu::always_inline]] inline std::uint64_t mix_key(std::uint64_t key, const KeyMix& mix) {
    return mix_key(key, mix.mask, (mix.bits + 1) / 2);
}

// Below `buckets`, which is below 2^32. `bits` is at most 63.
[[gnu::always_inline]] inline std::uint64_t home_bucket(std::uint64_t mixed, unsigned bits,
                                                        std::uint64_t buckets) {
    const std::uint64_t top = (mixed << (64U - bits)) >> 32U;
    return (top * buckets) >> 32U;
}

[[gnu::always_inline]] inline std::uint32_t remainder_of(std::uint64_t mixed) {
    return static_cast<std::uint32_t>(mixed) & kRemainderMask;
}

}  // namespace megatron_graft
