// Any bytes as an index file: they are refused with FormatError, or lookups in them are safe and sound.
//
// The first byte says how the rest becomes a file:
//   even  the rest is the file; its checksum is made right, so that what lies behind it is reached
//   odd   the rest gives the counts of a header that agrees with itself, and then the body: so the walk meets
//         every sort of body, which bytes at random, refused at the header, would hardly ever do
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "checked.hpp"
#include "fuzz/harness.hpp"
#include "fuzz/input.hpp"
#include "tests/header_bytes.hpp"
#include "tests/scratch.hpp"

namespace megatron_graft::fuzz {
namespace {

constexpr std::uint64_t kMaxFileBytes = 1U << 18U;
constexpr std::size_t kTextBytes = 160;

IndexHeader take_header(Input& input) {
    IndexHeader header{};
    header.max_order = static_cast<std::uint32_t>(1 + input.below(8));
    header.min_order = static_cast<std::uint32_t>(1 + input.below(header.max_order));
    header.vocab_size = 1 + input.below(input.byte() % 2 == 0 ? 40 : 3000);
    std::uint64_t entries = 0;
    if (header.min_order == 1) {
        header.unigrams = input.below(header.vocab_size + 1);
        entries += header.unigrams;
    }
    for (std::uint32_t order = 2; order <= header.max_order; ++order) {
        const std::uint64_t buckets = 1 + input.below(64);
        header.levels.push_back({order, input.below(8 * buckets), buckets, 0});
        entries += header.levels.back().entries;
    }
    header.phantoms = input.below(entries + 1);
    header.rows = entries - header.phantoms;
    lay_out(header);
    return header;
}

// The body's bytes are the input's, over and over; most words would be no lane's if they were not cut to fit.
testing::AlignedBytes take_file(Input& input) {
    const IndexHeader header = take_header(input);
    if (header.file_bytes > kMaxFileBytes) {
        return testing::AlignedBytes(0);
    }
    testing::AlignedBytes file(header.file_bytes);
    const auto page = serialise_index_header(header);
    std::memcpy(file.bytes().data(), page.data(), page.size());
    const std::uint32_t mask = static_cast<std::uint32_t>(input.number(4));
    const std::span<const std::uint8_t> source =
        input.take(input.left() - std::min(input.left(), kTextBytes));
    const auto body = file.bytes().subspan(kHeaderBytes);
    for (std::size_t at = 0; at + 4 <= body.size() && source.size() >= 4; at += 4) {
        std::uint32_t word = 0;
        std::memcpy(&word, source.data() + at % (source.size() - 3), 4);
        const bool is_lane = at / 4 % 16 < 8;
        word = is_lane ? word & (mask | kHasChild | 0x7c000000U)
                       : static_cast<std::uint32_t>(word % (header.nodes() + 2));
        std::memcpy(body.data() + at, &word, 4);
    }
    return file;
}

void run(Input input) {
    const bool is_file = input.byte() % 2 == 0;
    const std::uint64_t row_limit = input.byte() % 2 == 0 ? kMaxNodes : input.below(300);
    const Body body = take_body(input);
    testing::AlignedBytes file(0);
    if (is_file) {
        file = testing::AlignedBytes(std::as_bytes(input.rest()));
        input.take(input.left() - std::min(input.left(), kTextBytes));
        if (input.byte() % 16 != 0) {
            testing::repair_checksum(file.bytes());
        }
    } else {
        file = take_file(input);
    }
    const testing::AlignedBytes& view = file;
    try {
        const IndexHeader header = parse_index_header(view.bytes());
        look_up_everything(view.bytes(), take_text(input, header.vocab_size), row_limit, body);
        static_cast<void>(SuffixIndex(view.bytes()).count_contents());
    } catch (const FormatError&) {
        // What a reader of foreign bytes promises.
    }
}

}  // namespace
}  // namespace megatron_graft::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    megatron_graft::fuzz::run(megatron_graft::fuzz::Input(data, size));
    return 0;
}
