// Builds an index file from the keys of a bank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>

#include "index_format.hpp"

namespace megatron_graft {

// N keys; the row of a key is its place here. `ids` is [N, max_order], right-aligned: a key's newest token is
// in the last column, and columns left of its oldest token are not read.
struct KeyTable {
    std::span<const std::int32_t> ids;
    std::span<const std::uint8_t> orders;
    std::size_t max_order;

    [[nodiscard]] std::size_t rows() const { return orders.size(); }
    // The token `age` places before the newest one.
    [[nodiscard]] std::int32_t token(std::size_t row, std::size_t age) const {
        return ids[(row + 1) * max_order - 1 - age];
    }
};

struct BuildOptions {
    unsigned threads = 1;
    // For the entries being sorted: about so much, and at least what all keys with one suffix take, since
    // they are sorted together. 8 bytes a key come on top, and the file's own pages, which the kernel may
    // write out at any time. The bytes of the file do not depend on it, nor on the threads.
    std::uint64_t memory_bytes = 1ULL << 30U;
    // Told how many of `total` entries are done; called by the caller's thread only.
    std::function<void(std::uint64_t done, std::uint64_t total)> progress;
};

// Writes the index of `keys` to a new file and returns its header. A suffix of a key that is no key itself
// becomes a phantom: a node without a row.
// Throws std::invalid_argument if the keys disagree with each other or with the vocabulary, or if one is
// there twice; std::length_error if there are too many; std::system_error if the file cannot be written. No
// file is left behind then.
IndexHeader build_index(const std::filesystem::path& path, const KeyTable& keys, std::uint64_t vocab_size,
                        const IndexIdentity& identity, const BuildOptions& options);

}  // namespace megatron_graft
