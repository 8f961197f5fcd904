// Copies rows of a bank, by number, into one buffer: the columns of all donor layers side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace megatron_graft {

// The rows of one donor layer: `rows` rows of `row_bytes` bytes each, without gaps.
struct ColumnBlock {
    const std::byte* data;
    std::size_t rows;
    std::size_t row_bytes;
};

// Writes, for each of `rows`, its bytes from every block in turn. A negative row gives zeros.
// Throws, before it writes anything: std::out_of_range if a block has no such row, std::invalid_argument if
// `out` is not as long as the rows asked for.
void gather_rows(std::span<const ColumnBlock> blocks, std::span<const std::int64_t> rows,
                 std::span<std::byte> out);

}  // namespace megatron_graft
