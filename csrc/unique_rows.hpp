// Removes duplicates from row numbers before a gather, so that no row is read or sent twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace megatron_graft {

// Writes the distinct non-negative numbers among `rows` to the front of `unique_out`, ascending, and to
// `inverse_out`, for each of `rows`, k + 1 if it is the k-th of them (from 0) or 0 if it is negative. Returns
// how many there are; what lies behind them in `unique_out` is unspecified. Throws std::invalid_argument if
// `unique_out` is shorter than `rows` or `inverse_out` differs from it in length, std::length_error for 2^31
// - 1 rows or more.
std::size_t unique_rows(std::span<const std::int64_t> rows, std::span<std::int64_t> unique_out,
                        std::span<std::int32_t> inverse_out);

}  // namespace megatron_graft
