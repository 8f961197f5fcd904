// A file as bytes in memory, read-only.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace megatron_graft {

enum class Pages {
    kFile,  // the file's own pages, shared with every process that maps it; nothing is read until it is used
    kHuge,  // a private copy in anonymous memory, for which huge pages are asked
};

// Throws std::system_error naming the file if it cannot be opened, mapped or copied. A file that is cut short
// while it is mapped ends the process at the next access beyond its end.
class MappedFile {
  public:
    explicit MappedFile(const std::filesystem::path& path, Pages pages = Pages::kFile);
    ~MappedFile();
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }

  private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    std::size_t mapped_bytes_ = 0;  // size_ rounded up to whole huge pages, for a copy
};

// A new file that is written section by section, each as bytes in memory. The space of a section is reserved
// first, so that a full disk is an error there and not a signal at some later access. Unless keep() is
// called, the file is removed again.
class SectionFile {
  public:
    // Throws std::system_error naming the file if it exists or cannot be made.
    explicit SectionFile(const std::filesystem::path& path);
    ~SectionFile();
    SectionFile(const SectionFile&) = delete;
    SectionFile& operator=(const SectionFile&) = delete;

    // The bytes [offset, offset + size) of the file, zero where nothing was written yet; the section asked
    // for before is given back. Throws std::system_error if there is no space.
    [[nodiscard]] std::span<std::byte> section(std::size_t offset, std::size_t size);

    // Cuts the file to `size` bytes and lets it stay.
    void keep(std::size_t size);

  private:
    void release();

    std::filesystem::path path_;
    int descriptor_;
    bool kept_ = false;
    std::byte* mapping_ = nullptr;  // from the start of the page in which the section begins
    std::size_t mapped_bytes_ = 0;
};

}  // namespace megatron_graft
