// Files read and written at places of the caller's choosing, and files that only grow. Nothing is mapped:
// what a process takes of memory is its buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

namespace megatron_graft {

class PositionedFile {
  public:
    enum class Access { kRead, kUpdate };  // kUpdate makes the file if it is not there

    // Throws std::system_error naming the file if it cannot be opened.
    explicit PositionedFile(const std::filesystem::path& path, Access access = Access::kRead);
    ~PositionedFile();
    PositionedFile(PositionedFile&& other) noexcept;
    PositionedFile& operator=(PositionedFile&&) = delete;
    PositionedFile(const PositionedFile&) = delete;
    PositionedFile& operator=(const PositionedFile&) = delete;

    // Throws FormatError naming the file if it ends before `target` is full, std::system_error if it cannot
    // be read.
    void read(std::uint64_t offset, std::span<std::byte> target) const;

    // Throws std::system_error naming the file.
    void write(std::uint64_t offset, std::span<const std::byte> source) const;

    // The same for whole elements, `place` elements behind the start.
    template <typename Element>
    void read_elements(std::uint64_t place, std::span<Element> target) const {
        read(place * sizeof(Element), std::as_writable_bytes(target));
    }
    template <typename Element>
    void write_elements(std::uint64_t place, std::span<const Element> source) const {
        write(place * sizeof(Element), std::as_bytes(source));
    }

  private:
    std::filesystem::path path_;
    int descriptor_;
};

// Elements appended to a file through a buffer.
template <typename Element>
class AppendedFile {
  public:
    AppendedFile(const std::filesystem::path& path, std::size_t buffered)
        : file_(path, PositionedFile::Access::kUpdate) {
        buffer_.reserve(buffered);
    }

    void append(Element element) {
        if (buffer_.size() == buffer_.capacity()) {
            flush();
        }
        buffer_.push_back(element);
    }
    // Everything appended so far is in the file afterwards.
    void flush() {
        file_.write_elements(written_, std::span<const Element>(buffer_));
        written_ += buffer_.size();
        buffer_.clear();
    }
    [[nodiscard]] std::uint64_t size() const { return written_ + buffer_.size(); }

  private:
    PositionedFile file_;
    std::vector<Element> buffer_;
    std::uint64_t written_ = 0;
};

}  // namespace megatron_graft
