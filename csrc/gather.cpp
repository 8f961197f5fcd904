#include "gather.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arithmetic.hpp"

namespace megatron_graft {
namespace {

std::size_t total_row_bytes(std::span<const ColumnBlock> blocks) {
    std::size_t total = 0;
    for (const ColumnBlock& block : blocks) {
        static_cast<void>(
            checked_multiply(block.rows, block.row_bytes));  // so row * row_bytes below cannot wrap
        total += block.row_bytes;
    }
    return total;
}

void check_rows(std::span<const ColumnBlock> blocks, std::span<const std::int64_t> rows) {
    if (rows.empty()) {
        return;
    }
    const std::int64_t highest = *std::max_element(rows.begin(), rows.end());
    for (const ColumnBlock& block : blocks) {
        if (highest >= 0 && static_cast<std::uint64_t>(highest) >= block.rows) {
            throw std::out_of_range("row " + std::to_string(highest) + " of a bank of " +
                                    std::to_string(block.rows) + " rows");
        }
    }
}

}  // namespace

void gather_rows(std::span<const ColumnBlock> blocks, std::span<const std::int64_t> rows,
                 std::span<std::byte> out) {
    if (checked_multiply(rows.size(), total_row_bytes(blocks)) != out.size()) {
        throw std::invalid_argument("out is not as long as the rows asked for");
    }
    check_rows(blocks, rows);
    std::byte* target = out.data();
    for (const std::int64_t row : rows) {
        for (const ColumnBlock& block : blocks) {
            if (row < 0) {
                std::memset(target, 0, block.row_bytes);
            } else {
                std::memcpy(target, block.data + static_cast<std::size_t>(row) * block.row_bytes,
                            block.row_bytes);
            }
            target += block.row_bytes;
        }
    }
}

}  // namespace megatron_graft
