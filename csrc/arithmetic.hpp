// Sizes that come from outside are multiplied here, so that none can wrap around and pass a check.
#pragma once

#include <cstddef>
#include <limits>
#include <stdexcept>

namespace megatron_graft {

[[nodiscard]] inline std::size_t checked_multiply(std::size_t left, std::size_t right) {
    if (right != 0 && left > std::numeric_limits<std::size_t>::max() / right) {
        throw std::length_error("a size does not fit in 64 bits");
    }
    return left * right;
}

}  // namespace megatron_graft
