// Keys and a text from the input: the index built of the keys answers as the oracle does. Then bytes of its
// body are changed, and lookups must stay safe and sound.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

#include "fuzz/harness.hpp"
#include "fuzz/input.hpp"
#include "tests/keys.hpp"
#include "tests/oracle.hpp"
#include "tests/scratch.hpp"

namespace megatron_graft::fuzz {
namespace {

constexpr std::size_t kMaxKeys = 64;
constexpr std::size_t kMaxChanges = 32;

testing::KeySet take_keys(Input& input, std::uint64_t vocab_size) {
    testing::KeySet keys;
    const std::size_t count = 1 + input.below(kMaxKeys);
    const std::size_t width = vocab_size > 256 ? 3 : 1;
    while (keys.size() < count && (input.left() > 0 || keys.size() == 0)) {
        testing::Key key(1 + input.below(kMaxOrder));
        for (testing::Token& token : key) {
            token = static_cast<testing::Token>(input.number(width) % vocab_size);
        }
        keys.add(key);
    }
    return keys;
}

testing::AlignedBytes build(const testing::KeySet& keys, std::uint64_t vocab_size,
                            std::uint64_t memory_bytes) {
    static const testing::ScratchDirectory scratch;
    const std::filesystem::path path = scratch / "index";
    testing::write_index(path, keys, vocab_size, {1, memory_bytes, {}});
    testing::AlignedBytes file = testing::read_file(path);
    std::filesystem::remove(path);
    return file;
}

void run(Input input) {
    constexpr std::uint64_t kVocabSizes[] = {1, 2, 3, 5, 16, 250, 4099, 100'003};
    const std::uint64_t vocab_size = kVocabSizes[input.below(8)];
    const Body body = take_body(input);
    const std::uint64_t memory_bytes = std::uint64_t{1} << input.below(24);
    const testing::KeySet keys = take_keys(input, vocab_size);
    const std::uint64_t row_limit = input.byte() % 2 == 0 ? kMaxNodes : input.below(keys.size() + 1);
    const std::span<const std::uint8_t> quarter = input.take(input.left() / 4);
    Input changes(quarter.data(), quarter.size());
    const testing::Text text = take_text(input, vocab_size);

    testing::AlignedBytes file = build(keys, vocab_size, memory_bytes);
    const testing::AlignedBytes& view = file;
    const testing::Answer expected = testing::oracle_lookup(keys, text, vocab_size, row_limit);
    const SuffixIndex index(view.bytes(), row_limit, body);
    const testing::Answer answer = testing::native_lookup<std::int32_t>(index, text);
    if (answer != expected) {
        found("lookup: " + testing::first_difference(answer, expected));
    }
    const testing::Answer stepped = testing::stepped_lookup<std::int64_t>(index, text);
    if (stepped != expected) {
        found("incremental lookup: " + testing::first_difference(stepped, expected));
    }

    const std::span<std::byte> behind_header = file.bytes().subspan(kHeaderBytes);
    for (std::size_t count = 0; count < kMaxChanges && changes.left() > 0; ++count) {
        behind_header[changes.number(3) % behind_header.size()] = static_cast<std::byte>(changes.byte());
    }
    look_up_everything(view.bytes(), text, row_limit, body);
}

}  // namespace
}  // namespace megatron_graft::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    megatron_graft::fuzz::run(megatron_graft::fuzz::Input(data, size));
    return 0;
}
