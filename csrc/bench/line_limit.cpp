#include "line_limit.hpp"

#include <array>

#include "measure.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kBatch = 32;  // lines on their way while the batch before is read

// Nothing may leave the loop out: its sum ends up here.
volatile unsigned sink;

template <int kLocality>
double line_ns(std::span<const std::byte> region, std::size_t reads, std::uint64_t seed) {
    const std::size_t lines = region.size() / kLineBytes;
    std::array<std::array<const std::byte*, kBatch>, 2> batches;
    batches[0].fill(region.data());
    std::size_t current = 0;
    std::uint64_t counter = scatter(seed);
    unsigned sum = 0;
    const double start = thread_seconds();
    for (std::size_t read = 0; read < reads; read += kBatch) {
        for (const std::byte*& line : batches[1 - current]) {
            line = region.data() + scale_to(scatter(++counter), lines) * kLineBytes;
            __builtin_prefetch(line, 0, kLocality);
        }
        for (const std::byte* const line : batches[current]) {
            sum += std::to_integer<unsigned>(*line);
        }
        current = 1 - current;
    }
    const double taken = thread_seconds() - start;
    sink = sum;
    return taken * 1e9 / static_cast<double>((reads + kBatch - 1) / kBatch * kBatch);
}

}  // namespace

LineTimes random_line_times(std::span<const std::byte> region, std::size_t reads, std::uint64_t seed) {
    return {line_ns<3>(region, reads, 2 * seed), line_ns<2>(region, reads, 2 * seed + 1)};
}

}  // namespace megatron_graft::bench
