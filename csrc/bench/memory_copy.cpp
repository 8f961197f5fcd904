#include "memory_copy.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace megatron_graft::bench {

SmallPageCopy::SmallPageCopy(std::span<const std::byte> bytes) : size_(bytes.size()) {
    void* const address = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) {
        throw std::system_error(errno, std::generic_category(), "memory for a copy of the index");
    }
    static_cast<void>(::madvise(address, size_, MADV_NOHUGEPAGE));
    data_ = static_cast<std::byte*>(address);
    std::memcpy(data_, bytes.data(), size_);
}

SmallPageCopy::~SmallPageCopy() {
    ::munmap(data_, size_);
}

}  // namespace megatron_graft::bench
