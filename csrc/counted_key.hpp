// The key of a counted n-gram, and the mix by which keys are spread.
//
// The key of an n-gram is (node of the (n-1)-gram that ends where it ends) << 20 | its oldest token; a node
// is the place of a kept n-gram among those of its order, and that of one token is the token. Keys of one
// order are mixed by a bijection of as many bits as they have, so keys in the order of their mix are spread
// evenly, and any range of mixed keys is a fair share of the order.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "mixed_key.hpp"

namespace megatron_graft {

inline constexpr unsigned kCountedTokenBits = 20;
inline constexpr std::uint32_t kCountedTokenMask = (1U << kCountedTokenBits) - 1;
inline constexpr std::uint32_t kNoNode = std::numeric_limits<std::uint32_t>::max();
inline constexpr unsigned kMinCountedOrder = 2;
inline constexpr unsigned kMaxCountedOrder = 8;

// Keys above `parents` nodes. Throws std::length_error for more nodes than 32 bits tell apart.
inline KeyMix counted_key_mix(std::uint64_t parents) {
    if (parents > kNoNode) {
        throw std::length_error(std::to_string(parents) + " n-grams of one order do not fit in 32 bits");
    }
    return KeyMix(kCountedTokenBits + static_cast<unsigned>(std::bit_width(parents == 0 ? 0 : parents - 1)));
}

inline std::uint64_t counted_key(std::uint32_t node, std::uint32_t token) {
    return std::uint64_t{node} << kCountedTokenBits | token;
}

// What mix_key() makes of the answer is `mixed`.
inline std::uint64_t unmix_key(std::uint64_t mixed, const KeyMix& mix) {
    // A shift by half of the bits or more undoes itself; the factors are the inverses modulo 2^64.
    const unsigned half_bits = (mix.bits + 1) / 2;
    std::uint64_t key = mixed ^ (mixed >> half_bits);
    key = (key * 0xcfee444d8b59a89bULL) & mix.mask;
    key ^= key >> half_bits;
    key = (key * 0xf1de83e19937733dULL) & mix.mask;
    return key ^ (key >> half_bits);
}

// Which of `shares` equal ranges of mixed keys one lies in. `shares` is at most 2^32.
inline std::size_t share_of(std::uint64_t mixed, unsigned bits, std::uint64_t shares) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::size_t>((static_cast<Wide>(mixed) * shares) >> bits);
}

}  // namespace megatron_graft
