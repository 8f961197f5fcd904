// What every reader of foreign bytes needs: the error for bytes that are not what they claim to be, and
// arithmetic on sizes that cannot wrap around and so pass a check.
#pragma once

#include <cstddef>
#include <limits>
#include <stdexcept>

namespace megatron_graft {

// Bytes of a file are truncated, altered or malformed. The message names the field at fault.
class FormatError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Throws std::length_error if the product does not fit.
[[nodiscard]] inline std::size_t checked_multiply(std::size_t left, std::size_t right) {
    if (right != 0 && left > std::numeric_limits<std::size_t>::max() / right) {
        throw std::length_error("a size does not fit in 64 bits");
    }
    return left * right;
}

// Throws std::length_error if the sum does not fit.
[[nodiscard]] inline std::size_t checked_add(std::size_t left, std::size_t right) {
    if (left > std::numeric_limits<std::size_t>::max() - right) {
        throw std::length_error("a size does not fit in 64 bits");
    }
    return left + right;
}

}  // namespace megatron_graft
