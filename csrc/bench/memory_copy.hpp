// A copy of some bytes in anonymous memory of ordinary, 4 KiB pages, whatever the machine's default is.
#pragma once

#include <cstddef>
#include <span>

namespace megatron_graft::bench {

class SmallPageCopy {
  public:
    // Throws std::system_error if there is no memory.
    explicit SmallPageCopy(std::span<const std::byte> bytes);
    ~SmallPageCopy();
    SmallPageCopy(const SmallPageCopy&) = delete;
    SmallPageCopy& operator=(const SmallPageCopy&) = delete;

    [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }

  private:
    std::byte* data_;
    std::size_t size_;
};

}  // namespace megatron_graft::bench
