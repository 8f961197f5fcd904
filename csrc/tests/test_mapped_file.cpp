// Files as memory.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>

#include "check.hpp"
#include "mapped_file.hpp"
#include "scratch.hpp"

namespace megatron_graft::testing {
namespace {

std::filesystem::path write_bytes(const std::filesystem::path& path, std::size_t size) {
    std::ofstream stream(path, std::ios::binary);
    for (std::size_t index = 0; index < size; ++index) {
        stream.put(static_cast<char>(index * 7 % 251));
    }
    return path;
}

bool holds_pattern(std::span<const std::byte> bytes) {
    for (std::size_t index = 0; index < bytes.size(); ++index) {
        if (bytes[index] != static_cast<std::byte>(index * 7 % 251)) {
            return false;
        }
    }
    return true;
}

std::size_t open_descriptors() {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(entries), end(entries)));
}

TEST("a mapped file is its bytes, from its own pages and from huge ones") {
    const ScratchDirectory scratch;
    for (const std::size_t size : {1U, 63U, 4096U, 4097U, (2U << 20U) - 1, 2U << 20U, (2U << 20U) + 5}) {
        const auto path = write_bytes(scratch / "file", size);
        for (const Pages pages : {Pages::kFile, Pages::kHuge}) {
            const MappedFile file(path, pages);
            CHECK_EQUAL(file.bytes().size(), size);
            CHECK(holds_pattern(file.bytes()));
            CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(file.bytes().data()) % 4096, 0U);
        }
    }
}

TEST("a copy on huge pages starts on one and does not follow later changes of the file") {
    const ScratchDirectory scratch;
    const auto path = write_bytes(scratch / "file", 10'000);
    const MappedFile copy(path, Pages::kHuge);
    CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(copy.bytes().data()) % (2U << 20U), 0U);
    std::ofstream(path, std::ios::binary | std::ios::in | std::ios::out) << "changed";
    CHECK(holds_pattern(copy.bytes()));
}

TEST("an empty file is no bytes") {
    const ScratchDirectory scratch;
    const auto path = write_bytes(scratch / "file", 0);
    CHECK(MappedFile(path).bytes().empty());
    CHECK(MappedFile(path, Pages::kHuge).bytes().empty());
}

TEST("what is no readable regular file is refused by name") {
    const ScratchDirectory scratch;
    CHECK_THROWS(std::system_error, MappedFile(scratch / "missing"), "missing");
    CHECK_THROWS(std::system_error, MappedFile(scratch / "missing", Pages::kHuge), "missing");
    std::filesystem::create_directory(scratch / "directory");
    CHECK_THROWS(std::system_error, MappedFile(scratch / "directory"), "directory");
    CHECK_THROWS(std::system_error, MappedFile("/dev/null"), "/dev/null");
    CHECK_EQUAL(::mkfifo((scratch / "pipe").c_str(), 0600), 0);
    // A pipe nobody writes to would make a careless reader wait for ever.
    const int keep_open = ::open((scratch / "pipe").c_str(), O_RDWR | O_NONBLOCK);
    CHECK_THROWS(std::system_error, MappedFile(scratch / "pipe"), "pipe");
    ::close(keep_open);
}

TEST("a moved file stays mapped, and the one moved from is empty") {
    const ScratchDirectory scratch;
    const auto path = write_bytes(scratch / "file", 5000);
    MappedFile first(path);
    const std::byte* const address = first.bytes().data();
    MappedFile second(std::move(first));
    CHECK(second.bytes().data() == address);
    MappedFile third(write_bytes(scratch / "other", 10));
    third = std::move(second);
    CHECK(third.bytes().data() == address);
    CHECK(holds_pattern(third.bytes()));
}

TEST("a file stays readable after it was removed") {
    const ScratchDirectory scratch;
    const auto path = write_bytes(scratch / "file", 100'000);
    const MappedFile file(path);
    std::filesystem::remove(path);
    CHECK(holds_pattern(file.bytes()));
}

TEST("opening and refusing files a thousand times leaves no descriptor open") {
    const ScratchDirectory scratch;
    const auto path = write_bytes(scratch / "file", 5000);
    const std::size_t before = open_descriptors();
    for (int count = 0; count < 1000; ++count) {
        const MappedFile file(path, count % 8 == 0 ? Pages::kHuge : Pages::kFile);
        CHECK_THROWS(std::system_error, MappedFile(scratch / "missing"), "missing");
        CHECK_THROWS(std::system_error, MappedFile("/dev/null"), "regular");
    }
    CHECK_EQUAL(open_descriptors(), before);
}

TEST("sections written one after the other make a file, cut to the size that is kept") {
    const ScratchDirectory scratch;
    {
        SectionFile file(scratch / "file");
        const auto later = file.section(8192, 100);
        CHECK(std::all_of(later.begin(), later.end(), [](std::byte byte) { return byte == std::byte{0}; }));
        std::fill(later.begin(), later.end(), std::byte{3});
        const auto first = file.section(0, 50);
        std::fill(first.begin(), first.end(), std::byte{1});
        file.keep(8192 + 60);
    }
    const AlignedBytes content = read_file(scratch / "file");
    CHECK_EQUAL(content.bytes().size(), 8192U + 60U);
    for (std::size_t index = 0; index < content.bytes().size(); ++index) {
        const std::byte expected = index < 50 ? std::byte{1} : index < 8192 ? std::byte{0} : std::byte{3};
        CHECK(content.bytes()[index] == expected);
    }
}

TEST("a section asked for again holds what was written, grown or not") {
    const ScratchDirectory scratch;
    SectionFile file(scratch / "file");
    file.section(4096, 10)[3] = std::byte{9};
    CHECK(file.section(4096, 5000)[3] == std::byte{9});
}

TEST("a section may begin anywhere in a page, and spares what is before and behind it") {
    const ScratchDirectory scratch;
    constexpr std::size_t kBegin = 4096 + 64;
    constexpr std::size_t kSize = 9000;
    {
        SectionFile file(scratch / "file");
        std::ranges::fill(file.section(0, 20'000), std::byte{1});
        const auto inner = file.section(kBegin, kSize);
        CHECK_EQUAL(inner.size(), kSize);
        std::ranges::fill(inner, std::byte{2});
        file.keep(20'000);
    }
    const AlignedBytes content = read_file(scratch / "file");
    for (std::size_t index = 0; index < content.bytes().size(); ++index) {
        const bool inside = index >= kBegin && index < kBegin + kSize;
        CHECK(content.bytes()[index] == (inside ? std::byte{2} : std::byte{1}));
    }
}

TEST("a file that is not kept is removed, and one that exists is never written to") {
    const ScratchDirectory scratch;
    {
        static_cast<void>(SectionFile(scratch / "file").section(0, 4096));
    }
    CHECK(!std::filesystem::exists(scratch / "file"));
    const auto path = write_bytes(scratch / "kept", 77);
    CHECK_THROWS(std::system_error, SectionFile(path), "kept");
    CHECK(holds_pattern(read_file(path).bytes()));
    CHECK_THROWS(std::system_error, SectionFile(scratch / "no directory/file"), "directory");
}

TEST("space that the disk does not have is an error that names the file") {
    const ScratchDirectory scratch;
    SectionFile file(scratch / "file");
    CHECK_THROWS(std::system_error, file.section(0, std::size_t{1} << 60U), "file");
}

}  // namespace
}  // namespace megatron_graft::testing
