// Numbers in the header page of an index, by their places in the specification (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "index_format.hpp"
#include "scratch.hpp"

namespace megatron_graft::testing {

struct HeaderField {
    const char* name;
    std::size_t offset;
    std::size_t width;
};

inline constexpr std::size_t kChecksumOffset = 4092;
inline constexpr std::size_t kSectionTableOffset = 128;
inline constexpr std::size_t kSectionEntrySize = 64;

inline std::uint64_t read_number(std::span<const std::byte> bytes, std::size_t offset, std::size_t width) {
    std::uint64_t value = 0;
    for (std::size_t index = width; index > 0; --index) {
        value = value << 8U | std::to_integer<std::uint64_t>(bytes[offset + index - 1]);
    }
    return value;
}

inline void write_number(std::span<std::byte> bytes, std::size_t offset, std::size_t width,
                         std::uint64_t value) {
    for (std::size_t index = 0; index < width; ++index) {
        bytes[offset + index] = static_cast<std::byte>(value >> (8 * index));
    }
}

// Makes an altered header pass its checksum, so that what it says is looked at.
inline void repair_checksum(std::span<std::byte> file) {
    if (file.size() >= kHeaderBytes) {
        write_number(file, kChecksumOffset, 4, crc32(file.first(kChecksumOffset)));
    }
}

// A copy of `file` with one number of its header changed and the checksum repaired.
inline AlignedBytes with_number(std::span<const std::byte> file, std::size_t offset, std::size_t width,
                                std::uint64_t value) {
    AlignedBytes copy(file);
    write_number(copy.bytes(), offset, width, value);
    repair_checksum(copy.bytes());
    return copy;
}

}  // namespace megatron_graft::testing
