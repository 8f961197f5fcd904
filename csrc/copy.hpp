// Copying one piece of a row while the pieces that follow are on their way from memory.
#pragma once

#include <cstddef>

#include "body.hpp"

namespace megatron_graft {

// Copies `bytes` bytes from `source` to `target`, and asks for the lines of the `bytes` bytes at `ahead`,
// a piece that will be copied soon, one of them for each line copied. Any alignment, any length. `ahead` may
// be any readable address; `target` must not overlap `source`.
using CopyPiece = void(std::byte* target, const std::byte* source, const std::byte* ahead, std::size_t bytes);

struct CopyBody {
    CopyPiece* stream;  // whole lines of the target go past the caches; see finish_streaming
    CopyPiece* keep;    // the target stays in the caches
};

// kPlain copies piece by piece and leaves `ahead` alone; what a caller asks for itself stays as it is. Throws
// std::invalid_argument if the machine lacks `body`.
[[nodiscard]] CopyBody copy_body(Body body);

// Orders streamed stores before all later stores of this thread, so that another thread which sees one of
// those sees the copies as well.
void finish_streaming();

// Asks for the lines of `bytes` bytes, to be kept in the second-level cache.
inline void prefetch_bytes(const std::byte* source, std::size_t bytes) {
    constexpr std::size_t kLineBytes = 64;
    for (std::size_t offset = 0; offset < bytes; offset += kLineBytes) {
        __builtin_prefetch(source + offset, 0, 2);
    }
    if (bytes > 0) {
        __builtin_prefetch(source + bytes - 1, 0, 2);  // a source across line boundaries has one line more
    }
}

}  // namespace megatron_graft
