// The limit of any lookup: how fast this machine brings random cache lines of a region, fetched side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace megatron_graft::bench {

struct LineTimes {
    double near_ns;  // a line, fetched to the first-level cache
    double far_ns;   // a line, fetched to the second-level cache
    [[nodiscard]] double best() const { return near_ns < far_ns ? near_ns : far_ns; }
};

// One round over `reads` random lines, in nanoseconds of the thread's time. `seed` chooses the lines.
LineTimes random_line_times(std::span<const std::byte> region, std::size_t reads, std::uint64_t seed);

}  // namespace megatron_graft::bench
