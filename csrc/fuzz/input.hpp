// Reads a fuzzer's bytes as numbers. Where they run out, all numbers are 0.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace megatron_graft::fuzz {

class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

    [[nodiscard]] std::size_t left() const { return rest_.size(); }
    [[nodiscard]] std::span<const std::uint8_t> rest() const { return rest_; }

    std::uint8_t byte() {
        if (rest_.empty()) {
            return 0;
        }
        const std::uint8_t value = rest_.front();
        rest_ = rest_.subspan(1);
        return value;
    }
    std::uint64_t number(std::size_t bytes) {
        std::uint64_t value = 0;
        for (std::size_t index = 0; index < bytes; ++index) {
            value |= std::uint64_t{byte()} << (8 * index);
        }
        return value;
    }
    std::uint64_t below(std::uint64_t bound) { return number(bound > 256 ? 4 : 1) % bound; }
    std::span<const std::uint8_t> take(std::size_t count) {
        const std::size_t taken = std::min(count, rest_.size());
        const auto front = rest_.first(taken);
        rest_ = rest_.subspan(taken);
        return front;
    }

  private:
    std::span<const std::uint8_t> rest_;
};

}  // namespace megatron_graft::fuzz
