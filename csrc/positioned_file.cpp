#include "positioned_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "checked.hpp"

namespace megatron_graft {
namespace {

[[noreturn]] void fail(const char* what, const std::filesystem::path& path) {
    throw std::system_error(errno, std::generic_category(), std::string(what) + path.string());
}

}  // namespace

PositionedFile::PositionedFile(const std::filesystem::path& path, Access access)
    : path_(path),
      descriptor_(::open(path.c_str(),
                         access == Access::kRead ? O_RDONLY | O_CLOEXEC : O_RDWR | O_CREAT | O_CLOEXEC,
                         0644)) {
    if (descriptor_ < 0) {
        fail("cannot open ", path);
    }
}

PositionedFile::~PositionedFile() {
    if (descriptor_ >= 0) {
        ::close(descriptor_);
    }
}

PositionedFile::PositionedFile(PositionedFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

void PositionedFile::read(std::uint64_t offset, std::span<std::byte> target) const {
    while (!target.empty()) {
        const ssize_t got = ::pread(descriptor_, target.data(), target.size(), static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            fail("cannot read ", path_);
        }
        if (got == 0) {
            throw FormatError(path_.string() + " ends at byte " + std::to_string(offset) + ", " +
                              std::to_string(target.size()) + " bytes too early");
        }
        offset += static_cast<std::uint64_t>(got);
        target = target.subspan(static_cast<std::size_t>(got));
    }
}

void PositionedFile::write(std::uint64_t offset, std::span<const std::byte> source) const {
    while (!source.empty()) {
        const ssize_t put = ::pwrite(descriptor_, source.data(), source.size(), static_cast<off_t>(offset));
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put < 0) {
            fail("cannot write ", path_);
        }
        offset += static_cast<std::uint64_t>(put);
        source = source.subspan(static_cast<std::size_t>(put));
    }
}

}  // namespace megatron_graft
