// Building an index: the same bytes however it is done, exact whatever the keys are, and nothing left behind.
#include <algorithm>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "built_index.hpp"
#include "check.hpp"
#include "crowded.hpp"
#include "index_builder.hpp"
#include "mixed_key.hpp"
#include "shapes.hpp"

namespace megatron_graft::testing {
namespace {

bool same_bytes(const AlignedBytes& left, const AlignedBytes& right) {
    return std::ranges::equal(left.bytes(), right.bytes());
}

// In every body: the index answers as the oracle does where the text is made of the keys, whole, changed and
// cut.
void check_exact(const KeySet& keys, std::uint64_t vocab_size, const AlignedBytes& file, std::uint64_t seed) {
    Random random(seed);
    const TestBank bank{"", vocab_size, keys};
    for (const std::size_t shape : {0U, 1U, 2U, 5U}) {
        const Text text = make_text(random, bank, shape, 4000);
        const Answer expected = oracle_lookup(keys, text, vocab_size);
        for (const Body body : available_bodies()) {
            const Answer found =
                native_lookup<std::int32_t>(SuffixIndex(file.bytes(), kMaxNodes, body), text);
            CHECK_FOR(found == expected, std::string(kTextShapes[shape]) + ", body " + shown(body) + ": " +
                                             first_difference(found, expected));
        }
    }
}

// In every body: every key is found at its row.
void check_every_key(const KeySet& keys, const AlignedBytes& file) {
    for (const Body body : available_bodies()) {
        const SuffixIndex index(file.bytes(), kMaxNodes, body);
        for (std::size_t row = 0; row < keys.size(); ++row) {
            const Key& key = keys.keys()[row];
            const Text text{{key.begin(), key.end()}, key.size(), {}, {}};
            CHECK_EQUAL(native_lookup<std::int32_t>(index, text).rows.back(), static_cast<std::int64_t>(row));
        }
    }
}

void check_rejected(const std::vector<Key>& keys, std::size_t max_order, std::uint64_t vocab_size,
                    const std::string& message) {
    const ScratchDirectory scratch;
    const PackedKeys packed(keys, max_order);
    CHECK_THROWS(std::invalid_argument,
                 build_index(scratch / "index", packed.table(), vocab_size, test_identity(), {}), message);
    CHECK(!std::filesystem::exists(scratch / "index"));
}

TEST("the bytes do not depend on threads or memory") {
    Random random(20);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        const TestBank bank = make_bank(random, shape, 3000);
        const AlignedBytes expected = build_bytes(bank.keys, bank.vocab_size);
        for (const unsigned threads : {1U, 2U, 3U}) {
            for (const std::uint64_t memory :
                 {std::uint64_t{0}, std::uint64_t{1} << 12U, std::uint64_t{1} << 30U}) {
                // No memory at all is one entry at a time: for small banks only.
                if (memory == 0 && bank.keys.size() > 300) {
                    continue;
                }
                const AlignedBytes file = build_bytes(bank.keys, bank.vocab_size, {threads, memory, {}});
                CHECK_FOR(same_bytes(file, expected), bank.shape + ", " + std::to_string(threads) +
                                                          " threads, " + std::to_string(memory) + " bytes");
            }
        }
    }
}

TEST("the bytes of a bank of many entries do not depend on threads or memory") {
    Random random(21);
    TestBank bank{"corpus", 50257, {}};
    shapes::corpus(random, bank, 70'000, 1, 4);
    CHECK(bank.keys.size() >= 70'000);
    const AlignedBytes expected = build_bytes(bank.keys, bank.vocab_size);
    CHECK(same_bytes(build_bytes(bank.keys, bank.vocab_size, {3, std::uint64_t{1} << 18U, {}}), expected));
    CHECK(same_bytes(build_bytes(bank.keys, bank.vocab_size, {2, std::uint64_t{1} << 30U, {}}), expected));
    check_exact(bank.keys, bank.vocab_size, expected, 22);
}

TEST("phantoms are counted once, however many keys go on from them") {
    KeySet keys;
    keys.add({1, 2, 3, 4});
    keys.add({5, 2, 3, 4});
    keys.add({6, 3, 4});
    keys.add({3, 4});
    keys.add({9, 9});
    const AlignedBytes file = build_bytes(keys, 10);
    CHECK_EQUAL(parse_index_header(file.bytes()).phantoms, 1U);  // 2 3 4
    CHECK_EQUAL(parse_index_header(file.bytes()).rows, 5U);
    check_every_key(keys, file);
}

TEST("the header counts what the keys are, with and without suffixes among them") {
    Random random(23);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        const TestBank bank = make_bank(random, shape, 500);
        const ScratchDirectory scratch;
        const IndexHeader built = write_index(scratch / "index", bank.keys, bank.vocab_size);
        const AlignedBytes file = read_file(scratch / "index");
        const IndexHeader header = parse_index_header(file.bytes());
        CHECK_EQUAL(header.rows, bank.keys.size());
        CHECK_EQUAL(header.phantoms, bank.keys.phantoms());
        CHECK_EQUAL(header.vocab_size, bank.vocab_size);
        CHECK_EQUAL(header.max_order, bank.keys.max_order());
        CHECK_EQUAL(built.phantoms, header.phantoms);
        CHECK_EQUAL(built.file_bytes, file.bytes().size());
    }
}

TEST("one key makes an index, at every order and at both ends of the vocabulary's size") {
    for (const std::uint64_t vocab_size : {1ULL, 2ULL, 1ULL << 20U}) {
        for (std::size_t order = 1; order <= 8; ++order) {
            KeySet keys;
            keys.add(Key(order, static_cast<Token>(vocab_size - 1)));
            const AlignedBytes file = build_bytes(keys, vocab_size);
            check_every_key(keys, file);
            check_exact(keys, vocab_size, file, order);
        }
    }
}

TEST("a vocabulary of one id has one key an order") {
    KeySet keys;
    for (std::size_t order = 8; order >= 1; --order) {
        keys.add(Key(order, 0));
    }
    const AlignedBytes file = build_bytes(keys, 1);
    check_every_key(keys, file);
    check_exact(keys, 1, file, 24);
}

TEST("all n-grams of a small alphabet are told apart") {
    for (const std::size_t order : {1U, 2U, 5U, 8U}) {
        KeySet keys;
        for (std::size_t length = order; length >= 1; --length) {
            for (std::uint32_t bits = 0; bits < 1U << length; ++bits) {
                Key key;
                for (std::size_t place = 0; place < length; ++place) {
                    key.push_back(static_cast<Token>(bits >> place & 1U));
                }
                keys.add(key);
            }
        }
        const AlignedBytes file = build_bytes(keys, 2);
        CHECK_EQUAL(parse_index_header(file.bytes()).phantoms, 0U);
        check_every_key(keys, file);
        check_exact(keys, 2, file, order);
    }
}

TEST("an order with far fewer entries than parents gets buckets until remainders are exact") {
    // With as many buckets as entries alone would ask for, the remainder would be far too narrow here.
    constexpr std::uint64_t kVocabSize = 1ULL << 20U;  // the largest
    Random random(25);
    KeySet keys;
    for (int count = 0; count < 20'000; ++count) {
        keys.add(random_key(random, kVocabSize, 2));
    }
    for (int count = 0; count < 3; ++count) {
        keys.add(random_key(random, kVocabSize, 5));
    }
    const AlignedBytes file = build_bytes(keys, kVocabSize);
    const IndexHeader header = parse_index_header(file.bytes());
    CHECK_EQUAL(header.levels.size(), 4U);
    for (const IndexLevel& level : header.levels) {
        CHECK(remainder_is_exact(level.buckets, header.key_bits()));
    }
    CHECK_EQUAL(header.levels[3].entries, 3U);
    CHECK(header.levels[3].buckets >= 1ULL << (header.key_bits() - kRemainderBits));
    check_every_key(keys, file);
    check_exact(keys, kVocabSize, file, 26);
}

TEST("keys that share a remainder, and would be confused if buckets were fewer, are told apart") {
    KeySet keys;
    keys.add({11, 12});
    CHECK(unmixed_pair(mixed_pair({11, 12})) == Key({11, 12}));
    const AlignedBytes file = build_bytes(keys, kLargestVocabulary);
    CHECK_EQUAL(parse_index_header(file.bytes()).key_bits(), 40U);
    Text text{{}, 2, {}, {}};
    for (std::uint64_t upper = 0; upper < 1U << (40 - kRemainderBits); ++upper) {
        const Key pair = unmixed_pair(upper << kRemainderBits | remainder_of(mixed_pair({11, 12})));
        text.tokens.insert(text.tokens.end(), pair.begin(), pair.end());
    }
    const Answer expected = oracle_lookup(keys, text, kLargestVocabulary);
    CHECK_EQUAL(std::count(expected.rows.begin(), expected.rows.end(), 0), 1);
    for (const Body body : available_bodies()) {
        CHECK(native_lookup<std::int32_t>(SuffixIndex(file.bytes(), kMaxNodes, body), text) == expected);
    }
}

TEST("keys crowded into one bucket are displaced, and buckets are added where that is not enough") {
    // Nine lanes of one bucket, all that displacement can reach, and more than that.
    for (const std::size_t count : {9U, 100U, 248U, 249U, 420U}) {
        const KeySet keys = crowded_pairs(count, 5);
        const AlignedBytes file = build_bytes(keys, kLargestVocabulary, {2, std::uint64_t{1} << 10U, {}});
        const IndexHeader header = parse_index_header(file.bytes());
        CHECK_EQUAL(header.levels[0].entries, keys.size());
        CHECK_FOR((header.levels[0].buckets == 1ULL << 14U) == (count <= 248), std::to_string(count));
        CHECK(same_bytes(file, build_bytes(keys, kLargestVocabulary)));
        check_every_key(keys, file);
        check_exact(keys, kLargestVocabulary, file, count);
    }
}

TEST("keys crowded into the last bucket stay inside the section") {
    const KeySet keys = crowded_pairs(248, (1U << 14U) - 1);
    const AlignedBytes file = build_bytes(keys, kLargestVocabulary);
    CHECK_EQUAL(parse_index_header(file.bytes()).levels[0].buckets, 1ULL << 14U);
    check_every_key(keys, file);
    check_exact(keys, kLargestVocabulary, file, 30);
}

TEST("keys that no number of buckets can part are refused and leave no file") {
    KeySet keys;
    for (std::uint64_t mixed = 0; mixed < 400; ++mixed) {
        keys.add(unmixed_pair(mixed));
    }
    const ScratchDirectory scratch;
    CHECK_THROWS(std::length_error, write_index(scratch / "index", keys, kLargestVocabulary),
                 "the 400 suffixes of order 2 collide too often for 1048576 buckets");
    CHECK(!std::filesystem::exists(scratch / "index"));
}

TEST("more phantoms than rows widen the ids") {
    // 300 rows of order 8 have up to 6 phantoms each: more bits than the rows alone would need.
    Random random(31);
    KeySet keys;
    while (keys.size() < 300) {
        keys.add(random_key(random, 3, 8));
    }
    const AlignedBytes file = build_bytes(keys, 3);
    const IndexHeader header = parse_index_header(file.bytes());
    CHECK(header.phantoms > 2 * header.rows);
    CHECK_EQUAL(header.phantoms, keys.phantoms());
    check_every_key(keys, file);
    check_exact(keys, 3, file, 32);
}

TEST("a key that is there twice is refused with both rows, in every order") {
    for (std::size_t order = 1; order <= 8; ++order) {
        std::vector<Key> keys = {Key(order, 3), Key(order, 2), Key(8, 1), Key(order, 3)};
        check_rejected(keys, 8, 4, "row 3 repeats the key of row 0");
        keys[3] = Key(order, 0);
        const ScratchDirectory scratch;
        const PackedKeys packed(keys, 8);
        CHECK_EQUAL(build_index(scratch / "index", packed.table(), 4, test_identity(), {}).rows, 4U);
    }
}

TEST("a repeat is found in a bank of many, and the first one is named whatever the threads") {
    Random random(33);
    std::vector<Key> keys;
    KeySet distinct;
    while (keys.size() < 5000) {
        const Key key = random_key(random, 1000, 3);
        if (distinct.add(key)) {
            keys.push_back(key);
        }
    }
    keys[4321] = keys[77];
    keys[4999] = keys[4000];
    const PackedKeys packed(keys, 3);
    for (const unsigned threads : {1U, 2U, 3U}) {
        const ScratchDirectory scratch;
        CHECK_THROWS(
            std::invalid_argument,
            build_index(scratch / "index", packed.table(), 1000, test_identity(), {threads, 1U << 30U, {}}),
            "row 4321 repeats the key of row 77");
    }
}

TEST("keys and vocabularies that cannot be are refused") {
    check_rejected({{1, 2}, {1, 4}}, 2, 4, "row 1 has token 4");
    check_rejected({{1, 2}, {-1, 3}}, 2, 4, "row 1 has token -1");
    check_rejected({{1, 2}, {std::numeric_limits<Token>::min(), 3}}, 2, 4, "row 1 has token -2147483648");
    check_rejected({{1, 2}, {}}, 2, 4, "row 1 has order 0");
    check_rejected({{1, 2}}, 2, 0, "vocabulary");
    check_rejected({{1, 2}}, 2, (1ULL << 20U) + 1, "vocabulary");
    check_rejected({}, 2, 4, "key_ids");
    check_rejected({Key(9, 1)}, 9, 4, "key_ids");
    const ScratchDirectory scratch;
    const std::vector<std::int32_t> ids(7, 1);
    const std::vector<std::uint8_t> orders = {2, 2};
    CHECK_THROWS(std::invalid_argument,
                 build_index(scratch / "index", {ids, orders, 3}, 4, test_identity(), {}), "key_ids");
    const std::vector<std::uint8_t> too_long = {2, 4};
    CHECK_THROWS(
        std::invalid_argument,
        build_index(scratch / "index", {std::span(ids).first(6), too_long, 3}, 4, test_identity(), {}),
        "row 1 has order 4");
    CHECK(!std::filesystem::exists(scratch / "index"));
}

TEST("columns left of a key's oldest token are not read") {
    std::vector<std::int32_t> ids = {99, 99, 1, 2, 99, 99, 99, 3};
    const std::vector<std::uint8_t> orders = {2, 1};
    const ScratchDirectory scratch;
    build_index(scratch / "index", {ids, orders, 4}, 4, test_identity(), {});
    KeySet keys;
    keys.add({1, 2});
    keys.add({3});
    CHECK(same_bytes(read_file(scratch / "index"), build_bytes(keys, 4)));
}

TEST("a file that exists and a directory that does not are refused and left alone") {
    const ScratchDirectory scratch;
    KeySet keys;
    keys.add({1, 2});
    write_index(scratch / "index", keys, 4);
    const AlignedBytes before = read_file(scratch / "index");
    CHECK_THROWS(std::system_error, write_index(scratch / "index", keys, 4), "index");
    CHECK(same_bytes(read_file(scratch / "index"), before));
    CHECK_THROWS(std::system_error, write_index(scratch / "missing/index", keys, 4), "missing");
}

TEST("progress rises to its total, also where ids are widened under way") {
    Random random(34);
    const TestBank closed = make_bank(random, 1, 2000);
    TestBank widening{"more phantoms than rows", 3, {}};
    while (widening.keys.size() < 578) {
        widening.keys.add(random_key(random, 3, 8));
    }
    CHECK(widening.keys.phantoms() > widening.keys.size());
    for (const TestBank& bank : {closed, widening}) {
        std::vector<std::pair<std::uint64_t, std::uint64_t>> told;
        BuildOptions options{2, std::uint64_t{1} << 12U, {}};
        options.progress = [&](std::uint64_t done, std::uint64_t total) { told.push_back({done, total}); };
        build_bytes(bank.keys, bank.vocab_size, options);
        CHECK(told.size() > 2);
        CHECK_FOR(std::is_sorted(told.begin(), told.end()), bank.shape);
        CHECK_EQUAL(told.back().first, told.back().second);
        CHECK_EQUAL(told.front().second, told.back().second);
    }
}

TEST("a progress callback that throws ends the build and leaves no file") {
    const ScratchDirectory scratch;
    KeySet keys;
    keys.add({1, 2, 3});
    BuildOptions options;
    options.progress = [](std::uint64_t, std::uint64_t) {
        throw std::runtime_error("stopped by the caller");
    };
    CHECK_THROWS(std::runtime_error, write_index(scratch / "index", keys, 4, options),
                 "stopped by the caller");
    CHECK(!std::filesystem::exists(scratch / "index"));
}

}  // namespace
}  // namespace megatron_graft::testing
