// A directory that is removed with what is in it, and bytes that start on a cache line and end where they
// end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace megatron_graft::testing {

class ScratchDirectory {
  public:
    ScratchDirectory() {
        std::string name = (std::filesystem::temp_directory_path() / "graft-").string();
        name.append(6, 'X');  // the template that mkdtemp() fills in
        if (::mkdtemp(name.data()) == nullptr) {
            throw std::runtime_error("cannot make " + name);
        }
        path_ = name;
    }
    ~ScratchDirectory() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    ScratchDirectory(const ScratchDirectory&) = delete;
    ScratchDirectory& operator=(const ScratchDirectory&) = delete;

    [[nodiscard]] std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  private:
    std::filesystem::path path_;
};

// Aligned as a mapped file is for our purposes, but with nothing readable behind the last byte, so that an
// address sanitizer sees the first byte read too far.
class AlignedBytes {
  public:
    static constexpr std::size_t kAlignment = 64;

    explicit AlignedBytes(std::size_t size) : size_(size) {
        void* address = nullptr;
        if (::posix_memalign(&address, kAlignment, size == 0 ? 1 : size) != 0) {
            throw std::bad_alloc();
        }
        data_ = static_cast<std::byte*>(address);
        std::memset(data_, 0, size);
    }
    explicit AlignedBytes(std::span<const std::byte> source) : AlignedBytes(source.size()) {
        if (!source.empty()) {
            std::memcpy(data_, source.data(), source.size());
        }
    }
    ~AlignedBytes() { std::free(data_); }
    AlignedBytes(AlignedBytes&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    AlignedBytes& operator=(AlignedBytes&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    AlignedBytes(const AlignedBytes&) = delete;
    AlignedBytes& operator=(const AlignedBytes&) = delete;

    [[nodiscard]] std::span<std::byte> bytes() { return {data_, size_}; }
    [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }

  private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

inline AlignedBytes read_file(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    if (!stream) {
        throw std::runtime_error("cannot open " + path.string());
    }
    AlignedBytes content(static_cast<std::size_t>(stream.tellg()));
    stream.seekg(0);
    stream.read(reinterpret_cast<char*>(content.bytes().data()),
                static_cast<std::streamsize>(content.bytes().size()));
    if (!stream) {
        throw std::runtime_error("cannot read " + path.string());
    }
    return content;
}

}  // namespace megatron_graft::testing
