// The header of an index: what is written is read again, and nothing else is.
#include <algorithm>
#include <array>
#include <ranges>
#include <string>
#include <utility>
#include <vector>

#include "built_index.hpp"
#include "check.hpp"
#include "checked.hpp"
#include "header_bytes.hpp"
#include "index_format.hpp"
#include "mixed_key.hpp"

namespace megatron_graft::testing {
namespace {

constexpr std::uint64_t kAll = ~std::uint64_t{0};

// Orders 1, 2 and 3; small enough to be cut at every length.
const AlignedBytes& sound_file() {
    static const AlignedBytes file = [] {
        KeySet keys;
        keys.add({1});
        keys.add({2});
        keys.add({1, 2});
        keys.add({3, 1, 2});
        keys.add({3, 3, 3});
        return build_bytes(keys, 5);
    }();
    return file;
}

// The place of a field of the section of `order` in sound_file().
std::size_t in_section(std::size_t order, std::size_t offset) {
    return kSectionTableOffset + (order - 1) * kSectionEntrySize + offset;
}

void check_refused(std::size_t offset, std::size_t width, std::uint64_t value, const std::string& message) {
    const AlignedBytes& sound = sound_file();
    CHECK_FOR(read_number(sound.bytes(), offset, width) != value, "offset " + std::to_string(offset));
    const AlignedBytes file = with_number(sound.bytes(), offset, width, value);
    CHECK_THROWS(FormatError, parse_index_header(std::as_const(file).bytes()), message);
}

TEST("a checksum is that of zlib") {
    const std::string text = "123456789";
    CHECK_EQUAL(crc32(std::as_bytes(std::span(text))), 0xcbf43926U);
    CHECK_EQUAL(crc32({}), 0U);
}

TEST("a header says what the index was built from") {
    const IndexHeader header = parse_index_header(sound_file().bytes());
    CHECK_EQUAL(header.min_order, 1U);
    CHECK_EQUAL(header.max_order, 3U);
    CHECK_EQUAL(header.rows, 5U);
    CHECK_EQUAL(header.phantoms, 1U);  // 3 3
    CHECK_EQUAL(header.vocab_size, 5U);
    CHECK_EQUAL(header.unigrams, 2U);
    CHECK_EQUAL(header.levels.size(), 2U);
    CHECK_EQUAL(header.levels[0].entries, 2U);
    CHECK_EQUAL(header.levels[1].entries, 2U);
    CHECK_EQUAL(header.file_bytes, sound_file().bytes().size());
    CHECK(header.identity.tokenizer_sha256 == test_identity().tokenizer_sha256);
    CHECK(header.identity.keys_sha256 == test_identity().keys_sha256);
}

TEST("a header that was read is written again byte for byte") {
    const std::span<const std::byte> file = sound_file().bytes();
    const auto page = serialise_index_header(parse_index_header(file));
    CHECK(std::equal(page.begin(), page.end(), file.begin()));
}

TEST("each field of the header with a wrong value is refused by name") {
    check_refused(0, 8, 0x5442514654415247ULL, "magic");
    check_refused(8, 4, 0, "version");
    check_refused(8, 4, 2, "version");
    check_refused(12, 4, 0x04030201, "byte order");
    check_refused(16, 4, 8192, "header size");
    check_refused(20, 4, 0, "section count");
    check_refused(20, 4, 2, "section count");
    check_refused(20, 4, 4, "section count");
    check_refused(20, 4, 0xffffffff, "section count");
    check_refused(24, 4, 0, "shortest order");
    check_refused(24, 4, 2, "section count");
    check_refused(24, 4, 4, "shortest order");
    check_refused(28, 4, 0, "longest order");
    check_refused(28, 4, 2, "section count");
    check_refused(28, 4, 9, "longest order");
    check_refused(28, 4, 0xffffffff, "longest order");
    check_refused(32, 8, 0, "rows");
    check_refused(32, 8, 4, "entries");
    check_refused(32, 8, 1ULL << 32U, "rows");
    check_refused(32, 8, kAll, "rows");
    check_refused(40, 8, 0, "entries");
    check_refused(40, 8, (1ULL << 32U) - 5, "phantoms");
    check_refused(40, 8, kAll - 4, "phantoms");
    check_refused(48, 8, 0, "vocabulary");
    check_refused(48, 8, 1, "entries");
    check_refused(48, 8, (1ULL << 20U) + 1, "vocabulary");
    check_refused(48, 8, kAll, "vocabulary");
    check_refused(56, 8, 0, "file size");
    check_refused(56, 8, sound_file().bytes().size() + 64, "file size");
    check_refused(56, 8, kAll, "file size");
}

TEST("each field of a section with a wrong value is refused by the section's order") {
    for (const std::size_t order : {1U, 2U, 3U}) {
        const std::string name = "section of order " + std::to_string(order);
        check_refused(in_section(order, 0), 4, order + 1, name + ": order");
        check_refused(in_section(order, 4), 4, 63, name + ": key bits");
        check_refused(in_section(order, 24), 8, kAll, name + ": entries");
        check_refused(in_section(order, 24), 8, 3, "sum of the sections' entries");
        check_refused(in_section(order, 32), 8, kAll, name + ": buckets");
        check_refused(in_section(order, 32), 8, 1ULL << 32U, name + ": buckets");
    }
    check_refused(in_section(2, 32), 8, 0, "section of order 2: buckets");
    check_refused(in_section(2, 24), 8, 257, "section of order 2: entries");
    check_refused(in_section(2, 32), 8, 1ULL << 26U, "section of order 2: size");
    check_refused(in_section(2, 32), 8, (1ULL << 32U) - 1, "section of order 2: size");
}

TEST("sections that overlap, leave holes or lie outside the file are refused") {
    const std::span<const std::byte> file = sound_file().bytes();
    for (const std::size_t order : {1U, 2U, 3U}) {
        const std::string name = "section of order " + std::to_string(order);
        const std::size_t offset_at = in_section(order, 8);
        const std::size_t bytes_at = in_section(order, 16);
        const std::uint64_t offset = read_number(file, offset_at, 8);
        const std::uint64_t bytes = read_number(file, bytes_at, 8);
        for (const std::uint64_t wrong :
             {std::uint64_t{0}, offset - 4096, offset + 4096, offset + 64, std::uint64_t{file.size()},
              std::uint64_t{1} << 63U, kAll - 4095, kAll}) {
            check_refused(offset_at, 8, wrong, name + ": offset");
        }
        for (const std::uint64_t wrong :
             {std::uint64_t{0}, bytes - 1, bytes + 64, std::uint64_t{1} << 63U, kAll}) {
            check_refused(bytes_at, 8, wrong, name + ": size");
        }
    }
    // Two sections at each other's places.
    AlignedBytes swapped(file);
    const std::uint64_t second = read_number(file, in_section(2, 8), 8);
    const std::uint64_t third = read_number(file, in_section(3, 8), 8);
    write_number(swapped.bytes(), in_section(2, 8), 8, third);
    write_number(swapped.bytes(), in_section(3, 8), 8, second);
    repair_checksum(swapped.bytes());
    CHECK_THROWS(FormatError, parse_index_header(std::as_const(swapped).bytes()),
                 "section of order 2: offset");
}

// Places in the header: all of those that hold something, and some of the reserved ones.
std::vector<std::size_t> header_places() {
    std::vector<std::size_t> places;
    for (std::size_t offset = 0; offset < kHeaderBytes; offset += offset < 700 || offset >= 4085 ? 1 : 5) {
        places.push_back(offset);
    }
    return places;
}

TEST("a changed byte without a new checksum is refused, wherever it is in the header") {
    AlignedBytes file(sound_file().bytes());
    for (const std::size_t offset : header_places()) {
        file.bytes()[offset] ^= std::byte{0x10};
        CHECK_THROWS(FormatError, parse_index_header(std::as_const(file).bytes()), "");
        file.bytes()[offset] ^= std::byte{0x10};
    }
    CHECK_EQUAL(parse_index_header(std::as_const(file).bytes()).rows, 5U);
}

TEST("a changed byte with a new checksum is refused, except in the identities") {
    const std::span<const std::byte> sound = sound_file().bytes();
    for (const std::size_t offset : header_places()) {
        for (const std::uint64_t change : {0x01U, 0x80U}) {
            if (offset >= kChecksumOffset) {
                continue;
            }
            const AlignedBytes file = with_number(sound, offset, 1, read_number(sound, offset, 1) ^ change);
            if (offset >= 64 && offset < 128) {
                CHECK_EQUAL(parse_index_header(file.bytes()).rows, 5U);
                continue;
            }
            CHECK_THROWS(FormatError, parse_index_header(file.bytes()), "");
        }
    }
}

TEST("a file cut at any length is refused, and so is one with bytes behind its end") {
    const std::span<const std::byte> file = sound_file().bytes();
    for (std::size_t length = 0; length < file.size(); length += length < kHeaderBytes + 64 ? 1 : 61) {
        const AlignedBytes cut(file.first(length));
        CHECK_THROWS(FormatError, parse_index_header(std::as_const(cut).bytes()), "the file");
    }
    AlignedBytes longer(file.size() + 1);
    std::memcpy(longer.bytes().data(), file.data(), file.size());
    CHECK_THROWS(FormatError, parse_index_header(std::as_const(longer).bytes()), "size of the file");
}

TEST("a header that was read does not depend on bytes behind it") {
    AlignedBytes file(sound_file().bytes());
    for (std::byte& byte : file.bytes().subspan(kHeaderBytes)) {
        byte = std::byte{0xa5};
    }
    CHECK_EQUAL(parse_index_header(std::as_const(file).bytes()).rows, 5U);
}

// The least mixed key whose home is `home` or behind it.
std::uint64_t first_at_home(std::uint64_t home, unsigned key_bits, std::uint64_t buckets) {
    const auto keys = std::views::iota(std::uint64_t{0}, std::uint64_t{1} << key_bits);
    return *std::ranges::partition_point(
        keys, [&](std::uint64_t mixed) { return home_bucket(mixed, key_bits, buckets) < home; });
}

TEST("remainders are called exact only where no two keys share home and remainder") {
    // Few enough homes to measure the interval of keys that each owns.
    for (unsigned key_bits = 27; key_bits <= 31; ++key_bits) {
        const std::uint64_t needed = 1ULL << (key_bits - kRemainderBits);
        std::uint64_t least = 0;
        for (std::uint64_t buckets = 1; buckets <= needed + 2; ++buckets) {
            if (!remainder_is_exact(buckets, key_bits)) {
                continue;
            }
            least = least == 0 ? buckets : least;
            std::uint64_t begin = 0;
            for (std::uint64_t home = 1; home <= buckets; ++home) {
                const std::uint64_t end =
                    home == buckets ? 1ULL << key_bits : first_at_home(home, key_bits, buckets);
                CHECK_FOR(end - begin <= 1ULL << kRemainderBits, std::to_string(key_bits) + " bits, home " +
                                                                     std::to_string(home - 1) + " of " +
                                                                     std::to_string(buckets));
                begin = end;
            }
        }
        // The condition may be a little stricter than needed.
        CHECK(least >= needed && least <= needed + 1);
    }
    for (unsigned key_bits = 32; key_bits <= 52; ++key_bits) {
        const std::uint64_t needed = 1ULL << (key_bits - kRemainderBits);
        CHECK(!remainder_is_exact(needed - 1, key_bits));
        CHECK(remainder_is_exact(needed, key_bits));
    }
}

}  // namespace
}  // namespace megatron_graft::testing
