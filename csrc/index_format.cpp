#include "index_format.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "checked.hpp"

namespace megatron_graft {
namespace {

// Places of the fields in the header page.
constexpr std::size_t kMagicAt = 0;
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kByteOrderAt = 12;
constexpr std::size_t kHeaderBytesAt = 16;
constexpr std::size_t kSectionCountAt = 20;
constexpr std::size_t kMinOrderAt = 24;
constexpr std::size_t kMaxOrderAt = 28;
constexpr std::size_t kRowsAt = 32;
constexpr std::size_t kPhantomsAt = 40;
constexpr std::size_t kVocabSizeAt = 48;
constexpr std::size_t kFileBytesAt = 56;
constexpr std::size_t kTokenizerAt = 64;
constexpr std::size_t kKeysAt = 96;
constexpr std::size_t kSectionsAt = 128;
constexpr std::size_t kChecksumAt = kHeaderBytes - 4;

// A section's entry, and the places of its fields.
constexpr std::size_t kSectionEntryBytes = 64;
constexpr std::size_t kOrderIn = 0;
constexpr std::size_t kKeyBitsIn = 4;
constexpr std::size_t kOffsetIn = 8;
constexpr std::size_t kBytesIn = 16;
constexpr std::size_t kEntriesIn = 24;
constexpr std::size_t kBucketsIn = 32;

// The sections are read in place.
static_assert(std::endian::native == std::endian::little, "the index needs a little-endian machine");

using HeaderPage = std::array<std::byte, kHeaderBytes>;

template <typename Number>
Number load(std::span<const std::byte> bytes, std::size_t at) {
    static_assert(std::is_unsigned_v<Number>);
    Number value = 0;
    for (std::size_t index = 0; index < sizeof(Number); ++index) {
        value |= static_cast<Number>(std::to_integer<Number>(bytes[at + index]) << (8 * index));
    }
    return value;
}

template <typename Number>
void store(HeaderPage& page, std::size_t at, Number value) {
    static_assert(std::is_unsigned_v<Number>);
    for (std::size_t index = 0; index < sizeof(Number); ++index) {
        page[at + index] = static_cast<std::byte>(value >> (8 * index));
    }
}

void require(bool condition, const std::string& field, const std::string& problem) {
    if (!condition) {
        throw FormatError(field + " " + problem);
    }
}

void require_equal(std::uint64_t found, std::uint64_t expected, const std::string& field) {
    require(found == expected, field,
            "is " + std::to_string(found) + " where " + std::to_string(expected) + " is expected");
}

// Whether a file could hold so many buckets; also keeps all later arithmetic far from 64 bits.
bool plausible_buckets(std::uint64_t buckets) {
    return buckets >= 1 && buckets < (1ULL << 32U);
}

std::uint64_t section_bytes(const IndexHeader& header, std::uint32_t order, std::uint64_t buckets) {
    return order == 1 ? header.vocab_size * sizeof(std::uint32_t)
                      : (buckets + kGuardBuckets) * sizeof(Bucket);
}

std::uint64_t aligned(std::uint64_t offset) {
    return (offset + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
}

void check_preamble(std::span<const std::byte> file) {
    require(file.size() >= kHeaderBytes, "the file", "is shorter than a header");
    require(std::memcmp(file.data() + kMagicAt, kIndexMagic.data(), kIndexMagic.size()) == 0, "magic",
            "is not that of an index");
    require_equal(load<std::uint32_t>(file, kByteOrderAt), kByteOrderProbe, "byte order probe");
    require_equal(load<std::uint32_t>(file, kVersionAt), kIndexVersion, "version");
    require_equal(load<std::uint32_t>(file, kHeaderBytesAt), kHeaderBytes, "header size");
    require_equal(load<std::uint32_t>(file, kChecksumAt), crc32(file.first(kChecksumAt)), "header checksum");
}

void read_counts(std::span<const std::byte> file, IndexHeader& header) {
    header.min_order = load<std::uint32_t>(file, kMinOrderAt);
    header.max_order = load<std::uint32_t>(file, kMaxOrderAt);
    header.rows = load<std::uint64_t>(file, kRowsAt);
    header.phantoms = load<std::uint64_t>(file, kPhantomsAt);
    header.vocab_size = load<std::uint64_t>(file, kVocabSizeAt);
    require(header.max_order >= 1 && header.max_order <= kMaxOrder, "longest order", "is not from 1 to 8");
    require(header.min_order >= 1 && header.min_order <= header.max_order, "shortest order",
            "is not from 1 to the longest");
    require(header.rows >= 1 && header.rows <= kMaxNodes, "rows", "is not from 1 to 2^32 - 1");
    require(header.phantoms <= kMaxNodes - header.rows, "phantoms", "and rows exceed 2^32 - 1");
    require(header.vocab_size >= 1 && header.vocab_size <= kMaxVocabSize, "vocabulary size",
            "is not from 1 to 2^20");
    std::memcpy(header.identity.tokenizer_sha256.data(), file.data() + kTokenizerAt, 32);
    std::memcpy(header.identity.keys_sha256.data(), file.data() + kKeysAt, 32);
}

// The counts of one section go into `header`; its place is compared with the laid-out header later.
void read_section(std::span<const std::byte> entry, std::uint32_t order, IndexHeader& header) {
    const std::string name = "section of order " + std::to_string(order) + ": ";
    require_equal(load<std::uint32_t>(entry, kOrderIn), order, name + "order");
    const auto entries = load<std::uint64_t>(entry, kEntriesIn);
    const auto buckets = load<std::uint64_t>(entry, kBucketsIn);
    if (order == 1) {
        require(entries >= 1 && entries <= header.vocab_size, name + "entries",
                "is not from 1 to the vocabulary's size");
        require_equal(load<std::uint32_t>(entry, kKeyBitsIn), 0, name + "key bits");
        require_equal(buckets, 0, name + "buckets");
        header.unigrams = entries;
        return;
    }
    require_equal(load<std::uint32_t>(entry, kKeyBitsIn), header.key_bits(), name + "key bits");
    require(plausible_buckets(buckets), name + "buckets", "is not from 1 to 2^32 - 1");
    require(remainder_is_exact(buckets, header.key_bits()), name + "buckets", "are too few to be exact");
    require(entries <= (buckets + kGuardBuckets) * kLanes, name + "entries", "exceed the lanes");
    header.levels.push_back({order, entries, buckets, 0});
}

void read_sections(std::span<const std::byte> file, IndexHeader& header) {
    const std::uint32_t first = header.min_order == 1 ? 1 : 2;
    const std::uint32_t count = header.max_order + 1 - first;
    require_equal(load<std::uint32_t>(file, kSectionCountAt), count, "section count");
    std::uint64_t entries = 0;
    for (std::uint32_t index = 0; index < count; ++index) {
        const auto entry = file.subspan(kSectionsAt + index * kSectionEntryBytes, kSectionEntryBytes);
        read_section(entry, first + index, header);
        entries += first + index == 1 ? header.unigrams : header.levels.back().entries;
    }
    require_equal(entries, header.nodes(), "sum of the sections' entries");
}

// Compares the places that the header gives with those that follow from its counts.
void check_places(std::span<const std::byte> file, const IndexHeader& header) {
    std::size_t at = kSectionsAt;
    const auto check = [&](std::uint32_t order, std::uint64_t offset, std::uint64_t buckets) {
        const std::string name = "section of order " + std::to_string(order) + ": ";
        require_equal(load<std::uint64_t>(file, at + kOffsetIn), offset, name + "offset");
        require_equal(load<std::uint64_t>(file, at + kBytesIn), section_bytes(header, order, buckets),
                      name + "size");
        at += kSectionEntryBytes;
    };
    if (header.min_order == 1) {
        check(1, header.unigrams_offset, 0);
    }
    for (const IndexLevel& level : header.levels) {
        check(level.order, level.offset, level.buckets);
    }
    require_equal(load<std::uint64_t>(file, kFileBytesAt), header.file_bytes, "file size in the header");
    require_equal(file.size(), header.file_bytes, "size of the file");
}

}  // namespace

unsigned IndexHeader::token_bits() const {
    return std::max(1U, static_cast<unsigned>(std::bit_width(vocab_size - 1)));
}

unsigned IndexHeader::key_bits() const {
    const auto id_bits = static_cast<unsigned>(std::bit_width(nodes() - 1));
    return std::max(id_bits, token_bits()) + token_bits();
}

bool remainder_is_exact(std::uint64_t buckets, unsigned key_bits) {
    // A home bucket is chosen by the upper 32 bits of a mixed key, so it owns one interval of mixed keys.
    const std::uint64_t tops = ((1ULL << 32U) + buckets - 1) / buckets;
    if (key_bits <= kRemainderBits) {
        return true;
    }
    if (key_bits >= 32) {
        return tops <= (1ULL << kRemainderBits) >> (key_bits - 32U);
    }
    return tops >> (32U - key_bits) < (1ULL << kRemainderBits);
}

void lay_out(IndexHeader& header) {
    std::uint64_t end = kHeaderBytes;
    const auto place = [&](std::uint32_t order, std::uint64_t buckets) {
        const std::uint64_t offset = aligned(end);
        end = checked_add(offset, section_bytes(header, order, buckets));
        return offset;
    };
    header.unigrams_offset = header.min_order == 1 ? place(1, 0) : 0;
    for (IndexLevel& level : header.levels) {
        level.offset = place(level.order, level.buckets);
    }
    header.file_bytes = end;
}

std::array<std::byte, kHeaderBytes> serialise_index_header(const IndexHeader& header) {
    HeaderPage page{};
    std::memcpy(page.data() + kMagicAt, kIndexMagic.data(), kIndexMagic.size());
    store(page, kVersionAt, kIndexVersion);
    store(page, kByteOrderAt, kByteOrderProbe);
    store(page, kHeaderBytesAt, static_cast<std::uint32_t>(kHeaderBytes));
    store(page, kMinOrderAt, header.min_order);
    store(page, kMaxOrderAt, header.max_order);
    store(page, kRowsAt, header.rows);
    store(page, kPhantomsAt, header.phantoms);
    store(page, kVocabSizeAt, header.vocab_size);
    store(page, kFileBytesAt, header.file_bytes);
    std::memcpy(page.data() + kTokenizerAt, header.identity.tokenizer_sha256.data(), 32);
    std::memcpy(page.data() + kKeysAt, header.identity.keys_sha256.data(), 32);
    std::uint32_t count = 0;
    const auto add = [&](const IndexLevel& level, unsigned key_bits) {
        const std::size_t at = kSectionsAt + count++ * kSectionEntryBytes;
        store(page, at + kOrderIn, level.order);
        store(page, at + kKeyBitsIn, static_cast<std::uint32_t>(key_bits));
        store(page, at + kOffsetIn, level.offset);
        store(page, at + kBytesIn, section_bytes(header, level.order, level.buckets));
        store(page, at + kEntriesIn, level.entries);
        store(page, at + kBucketsIn, level.buckets);
    };
    if (header.min_order == 1) {
        add({1, header.unigrams, 0, header.unigrams_offset}, 0);
    }
    for (const IndexLevel& level : header.levels) {
        add(level, header.key_bits());
    }
    store(page, kSectionCountAt, count);
    store(page, kChecksumAt, crc32(std::span<const std::byte>(page).first(kChecksumAt)));
    return page;
}

IndexHeader parse_index_header(std::span<const std::byte> file) {
    check_preamble(file);
    IndexHeader header{};
    read_counts(file, header);
    read_sections(file, header);
    lay_out(header);
    check_places(file, header);
    // What remains, the reserved bytes, has one right value: that of the header written anew.
    const HeaderPage expected = serialise_index_header(header);
    const auto differs = std::mismatch(expected.begin(), expected.end(), file.begin()).first;
    require(differs == expected.end(),
            "byte " + std::to_string(differs - expected.begin()) + " of the header",
            "is not what the rest of the header implies");
    return header;
}

std::uint32_t crc32(std::span<const std::byte> bytes) {
    std::uint32_t remainder = 0xffffffffU;
    for (const std::byte byte : bytes) {
        remainder ^= std::to_integer<std::uint32_t>(byte);
        for (int bit = 0; bit < 8; ++bit) {
            remainder = (remainder >> 1U) ^ (0xedb88320U & (0U - (remainder & 1U)));
        }
    }
    return ~remainder;
}

}  // namespace megatron_graft
