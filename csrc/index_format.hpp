// The index file: one header page, then one section for unigrams (if keys of one token exist) and one for
// every order from 2 to the longest. docs/format.md is the specification; this file is its only reader in
// C++.
//
// All numbers are little-endian. Everything that a section is made of (its place, its size, the width of its
// keys) follows from a few counts, so a header that disagrees with itself in any way is refused.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace megatron_graft {

inline constexpr std::array<char, 8> kIndexMagic = {'G', 'R', 'A', 'F', 'T', 'Q', 'B', 'T'};
inline constexpr std::uint32_t kIndexVersion = 1;
inline constexpr std::uint32_t kByteOrderProbe = 0x01020304;
inline constexpr std::size_t kHeaderBytes = 4096;
inline constexpr std::size_t kSectionAlignment = 4096;

inline constexpr std::uint32_t kMaxOrder = 8;
inline constexpr std::uint64_t kMaxVocabSize = 1ULL << 20U;
// Ids of rows and phantoms are 32 bits; the highest one means "none" in the section of unigrams.
inline constexpr std::uint64_t kMaxNodes = (1ULL << 32U) - 1;
inline constexpr std::uint32_t kNoRow = 0xffffffffU;

// A bucket is one cache line: eight words, then the eight ids that belong to them. A word is
//   bit 31: the node has children | bits 26..30: displacement | bits 0..25: remainder of the mixed key.
inline constexpr std::size_t kLanes = 8;
inline constexpr unsigned kRemainderBits = 26;
inline constexpr std::uint32_t kRemainderMask = (1U << kRemainderBits) - 1;
inline constexpr std::uint32_t kHasChild = 1U << 31U;
inline constexpr std::uint32_t kMaxDisplacement = 30;  // 31 marks an empty lane
inline constexpr std::uint32_t kEmptyWord = 0x7fffffffU;
// Behind the last bucket of a level: a walk that is displaced from there stays inside the section.
inline constexpr std::uint64_t kGuardBuckets = kMaxDisplacement + 1;

struct alignas(64) Bucket {
    std::array<std::uint32_t, kLanes> words;
    std::array<std::uint32_t, kLanes> ids;
};
static_assert(sizeof(Bucket) == 64);

// What the index was built from.
struct IndexIdentity {
    std::array<std::uint8_t, 32> tokenizer_sha256;
    std::array<std::uint8_t, 32> keys_sha256;
};

// One order's table. `entries` counts its nodes, phantoms included.
struct IndexLevel {
    std::uint32_t order;
    std::uint64_t entries;
    std::uint64_t buckets;  // without the guard
    std::uint64_t offset;   // of the first bucket, in bytes from the start of the file
};

struct IndexHeader {
    std::uint32_t min_order;
    std::uint32_t max_order;
    std::uint64_t rows;
    std::uint64_t phantoms;
    std::uint64_t vocab_size;
    std::uint64_t file_bytes;
    std::uint64_t unigrams_offset;   // 0 if there is no section of unigrams
    std::uint64_t unigrams;          // how many keys have one token
    std::vector<IndexLevel> levels;  // orders 2..max_order
    IndexIdentity identity;

    [[nodiscard]] std::uint64_t nodes() const { return rows + phantoms; }
    [[nodiscard]] unsigned token_bits() const;
    // Width of a key: an id (or the newest token, at order 2) above the token that extends it.
    [[nodiscard]] unsigned key_bits() const;
};

// Whether the remainder tells apart all keys that share a home bucket. It is what makes the index exact.
[[nodiscard]] bool remainder_is_exact(std::uint64_t buckets, unsigned key_bits);

// Reads and checks a header against itself and against the size of the file. After that any lookup stays
// inside the file and ends, whatever the sections hold.
// Throws FormatError naming the field at fault.
[[nodiscard]] IndexHeader parse_index_header(std::span<const std::byte> file);

// Fills in the places of all sections and the size of the file, from the counts.
// Throws std::length_error if they do not fit.
void lay_out(IndexHeader& header);

// The header page of a laid-out header.
[[nodiscard]] std::array<std::byte, kHeaderBytes> serialise_index_header(const IndexHeader& header);

// CRC-32 as zlib computes it.
[[nodiscard]] std::uint32_t crc32(std::span<const std::byte> bytes);

}  // namespace megatron_graft
