#include "mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>
#include <utility>

namespace megatron_graft {
namespace {

constexpr std::size_t kHugePageBytes = 2U << 20U;
constexpr std::size_t kReadBytes = 64U << 20U;

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& what, int error = errno) {
    throw std::system_error(error, std::generic_category(), path.string() + ": " + what);
}

class Descriptor {
  public:
    Descriptor(const std::filesystem::path& path, int flags)
        : number_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
        if (number_ < 0) {
            fail(path, "cannot be opened");
        }
    }
    ~Descriptor() { ::close(number_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    [[nodiscard]] int number() const { return number_; }

  private:
    int number_;
};

std::byte* map(const std::filesystem::path& path, std::size_t size, int protection, int flags,
               int descriptor) {
    void* const address = ::mmap(nullptr, size, protection, flags, descriptor, 0);
    if (address == MAP_FAILED) {
        fail(path, "cannot be mapped");
    }
    return static_cast<std::byte*>(address);
}

void read_all(const std::filesystem::path& path, int descriptor, std::span<std::byte> target) {
    std::size_t done = 0;
    while (done < target.size()) {
        const std::size_t wanted = std::min(kReadBytes, target.size() - done);
        const ssize_t got = ::pread(descriptor, target.data() + done, wanted, static_cast<off_t>(done));
        if (got < 0 && errno != EINTR) {
            fail(path, "cannot be read");
        }
        if (got == 0) {
            fail(path, "became shorter while it was read", EIO);
        }
        done += static_cast<std::size_t>(std::max<ssize_t>(got, 0));
    }
}

// Anonymous memory that starts on a huge page: mapped a page too long, and cut at both ends.
std::byte* map_huge(const std::filesystem::path& path, std::size_t size) {
    const std::size_t total = size + kHugePageBytes;
    std::byte* const raw = map(path, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    const auto address = reinterpret_cast<std::uintptr_t>(raw);
    const std::size_t lead = (kHugePageBytes - address % kHugePageBytes) % kHugePageBytes;
    if (lead != 0) {
        ::munmap(raw, lead);
    }
    ::munmap(raw + lead + size, total - lead - size);
    // Advice: a kernel without huge pages gives ordinary ones.
    static_cast<void>(::madvise(raw + lead, size, MADV_HUGEPAGE));
    return raw + lead;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path, Pages pages) {
    // Not blocking: a pipe without a writer is refused below instead of waited for.
    const Descriptor descriptor(path, O_RDONLY | O_NONBLOCK);
    struct stat status{};
    if (::fstat(descriptor.number(), &status) != 0) {
        fail(path, "cannot be examined");
    }
    if (!S_ISREG(status.st_mode)) {
        fail(path, "is not a regular file", EINVAL);
    }
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ == 0) {
        return;
    }
    if (pages == Pages::kFile) {
        mapped_bytes_ = size_;
        data_ = map(path, size_, PROT_READ, MAP_SHARED, descriptor.number());
        // Advice: on file systems with huge pages (a tmpfs mounted so) the kernel may use them.
        static_cast<void>(::madvise(const_cast<std::byte*>(data_), size_, MADV_HUGEPAGE));
        return;
    }
    mapped_bytes_ = (size_ + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    std::byte* const copy = map_huge(path, mapped_bytes_);
    try {
        read_all(path, descriptor.number(), {copy, size_});
    } catch (...) {
        ::munmap(copy, mapped_bytes_);
        throw;
    }
    static_cast<void>(::mprotect(copy, mapped_bytes_, PROT_READ));
    data_ = copy;
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        ::munmap(const_cast<std::byte*>(data_), mapped_bytes_);
    }
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_bytes_(std::exchange(other.mapped_bytes_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    return *this;
}

SectionFile::SectionFile(const std::filesystem::path& path)
    : path_(path), descriptor_(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644)) {
    if (descriptor_ < 0) {
        fail(path, "cannot be made");
    }
}

SectionFile::~SectionFile() {
    release();
    ::close(descriptor_);
    if (!kept_) {
        ::unlink(path_.c_str());
    }
}

std::span<std::byte> SectionFile::section(std::size_t offset, std::size_t size) {
    release();
    int error = EINTR;
    while (error == EINTR) {
        error = ::posix_fallocate(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(size));
    }
    if (error != 0) {
        fail(path_, "has no space for " + std::to_string(size) + " bytes more", error);
    }
    // A mapping starts on a page, whose size is the machine's and not the format's.
    const std::size_t lead = offset % static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    void* const address = ::mmap(nullptr, lead + size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_,
                                 static_cast<off_t>(offset - lead));
    if (address == MAP_FAILED) {
        fail(path_, "cannot be mapped");
    }
    mapping_ = static_cast<std::byte*>(address);
    mapped_bytes_ = lead + size;
    return {mapping_ + lead, size};
}

void SectionFile::keep(std::size_t size) {
    release();
    if (::ftruncate(descriptor_, static_cast<off_t>(size)) != 0) {
        fail(path_, "cannot be cut to " + std::to_string(size) + " bytes");
    }
    kept_ = true;
}

void SectionFile::release() {
    if (mapping_ != nullptr) {
        ::munmap(mapping_, mapped_bytes_);
    }
    mapping_ = nullptr;
    mapped_bytes_ = 0;
}

}  // namespace megatron_graft
