// Memory for tables that are read at random places, on huge pages where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

#include "checked.hpp"

namespace megatron_graft {

// So many elements, not set to anything; memory is taken as they are first written.
template <typename Element>
class HugeMemory {
  public:
    static constexpr std::size_t kSmallPage = 4096;
    static constexpr std::size_t kHugePage = std::size_t{1} << 21U;

    // Throws std::bad_alloc.
    explicit HugeMemory(std::size_t size) : size_(size) {
        const std::size_t bytes = checked_multiply(size == 0 ? 1 : size, sizeof(Element));
        const std::size_t page = bytes >= kHugePage ? kHugePage : kSmallPage;
        const std::size_t whole = checked_add(bytes, page - 1) / page * page;
        data_.reset(static_cast<Element*>(std::aligned_alloc(page, whole)));
        if (!data_) {
            throw std::bad_alloc();
        }
#ifdef MADV_HUGEPAGE
        if (page == kHugePage) {
            ::madvise(data_.get(), whole, MADV_HUGEPAGE);
        }
#endif
    }

    [[nodiscard]] Element* data() { return data_.get(); }
    [[nodiscard]] const Element* data() const { return data_.get(); }
    [[nodiscard]] std::size_t size() const { return size_; }

  private:
    struct Free {
        void operator()(Element* memory) const { std::free(memory); }
    };
    std::unique_ptr<Element, Free> data_;
    std::size_t size_;
};

}  // namespace megatron_graft
