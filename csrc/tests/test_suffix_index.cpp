// Lookups against the oracle: every body, both widths of ids, and what lies at the edges.
#include <atomic>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "built_index.hpp"
#include "check.hpp"
#include "shapes.hpp"
#include "suffix_index.hpp"

namespace megatron_graft::testing {
namespace {

void check_bodies(const SuffixIndex& index, const Text& text, const Answer& expected,
                  const std::string& what) {
    const Answer narrow = native_lookup<std::int32_t>(index, text);
    CHECK_FOR(narrow == expected, what + ", int32: " + first_difference(narrow, expected));
    const Answer wide = native_lookup<std::int64_t>(index, text);
    CHECK_FOR(wide == expected, what + ", int64: " + first_difference(wide, expected));
}

// The index of `keys` answers as the oracle does, in every body, for every row limit given.
void check_text(const KeySet& keys, std::uint64_t vocab_size, const Text& text,
                const std::vector<std::uint64_t>& limits = {kMaxNodes}) {
    const AlignedBytes file = build_bytes(keys, vocab_size);
    for (const std::uint64_t limit : limits) {
        const Answer expected = oracle_lookup(keys, text, vocab_size, limit);
        for (const Body body : available_bodies()) {
            const SuffixIndex index(file.bytes(), limit, body);
            check_bodies(index, text, expected, "body " + shown(body) + ", limit " + std::to_string(limit));
        }
    }
}

KeySet alphabet_keys(std::size_t max_order) {
    KeySet keys;
    Random random(5);
    for (int count = 0; count < 200; ++count) {
        keys.add(random_key(random, 4, random.between(1, max_order)));
    }
    return keys;
}

Text alphabet_text(std::size_t positions, std::size_t length, std::uint64_t seed) {
    Random random(seed);
    Text text;
    text.length = length;
    for (std::size_t position = 0; position < positions; ++position) {
        text.tokens.push_back(random.token(4));
    }
    return text;
}

TEST("answers are the oracle's for banks and texts of every shape, in every body") {
    Random random(2);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        for (std::size_t text_shape = 0; text_shape < kTextShapes.size(); ++text_shape) {
            const TestBank bank = make_bank(random, shape, random.between(1, 80));
            const Text text = make_text(random, bank, text_shape, 1500);
            const AlignedBytes file = build_bytes(bank.keys, bank.vocab_size);
            const std::uint64_t limit = random.one_in(2) ? random.below(bank.keys.size() + 1) : kMaxNodes;
            const Answer expected = oracle_lookup(bank.keys, text, bank.vocab_size, limit);
            for (const Body body : available_bodies()) {
                check_bodies(SuffixIndex(file.bytes(), limit, body), text, expected,
                             bank.shape + ", " + kTextShapes[text_shape] + ", body " + shown(body));
            }
        }
    }
}

TEST("every key is found at its row") {
    Random random(3);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        const TestBank bank = make_bank(random, shape, 400);
        const AlignedBytes file = build_bytes(bank.keys, bank.vocab_size);
        for (const Body body : available_bodies()) {
            const SuffixIndex index(file.bytes(), kMaxNodes, body);
            for (std::size_t row = 0; row < bank.keys.size(); ++row) {
                const Key& key = bank.keys.keys()[row];
                const Text text{{key.begin(), key.end()}, key.size(), {}, {}};
                const Answer answer = native_lookup<std::int32_t>(index, text);
                CHECK_EQUAL(answer.rows.back(), static_cast<std::int64_t>(row));
                CHECK_EQUAL(answer.orders.back(), key.size());
            }
        }
    }
}

TEST("sequences shorter than the longest order, down to one token, are looked up") {
    const KeySet keys = alphabet_keys(8);
    for (std::size_t length = 1; length <= 9; ++length) {
        check_text(keys, 4, alphabet_text(60 * length, length, length));
    }
}

TEST("sequences of every length around the size of a block are looked up") {
    const KeySet keys = alphabet_keys(6);
    for (const std::size_t length :
         {31U, 32U, 33U, 127U, 128U, 129U, 2047U, 2048U, 2049U, 2055U, 4097U, 9000U}) {
        check_text(keys, 4, alphabet_text(length, length, length));
        check_text(keys, 4, alphabet_text(3 * length, length, length));
    }
}

TEST("a batch of no sequences and sequences of no tokens have no answers") {
    const AlignedBytes file = build_bytes(alphabet_keys(3), 4);
    const SuffixIndex index(file.bytes());
    for (const std::size_t length : {0U, 1U, 5U}) {
        CHECK(native_lookup<std::int32_t>(index, {{}, length, {}, {}}).rows.empty());
        CHECK(native_lookup<std::int64_t>(index, {{}, length, {}, 3}).rows.empty());
    }
}

TEST("ids at the ends of the vocabulary are found and ids outside it are not") {
    for (const std::uint64_t vocab_size : {1ULL, 2ULL, 3ULL, 131072ULL, (1ULL << 20U) - 1, 1ULL << 20U}) {
        KeySet keys;
        const auto last = static_cast<Token>(vocab_size - 1);
        keys.add({0, last});
        keys.add({last, last, last});
        keys.add({last});
        keys.add({last, 0, last});
        const auto size = static_cast<std::int64_t>(vocab_size);
        Text text{{last, last, last, 0, last, -1, last, size, last, last, size + 1, 0, last, 2'147'483'647,
                   last, last},
                  16,
                  {},
                  {}};
        check_text(keys, vocab_size, text);
    }
}

TEST("64-bit ids are not cut to 32 bits") {
    const KeySet keys = alphabet_keys(3);
    const AlignedBytes file = build_bytes(keys, 4);
    const SuffixIndex index(file.bytes());
    Text text = alphabet_text(400, 40, 8);
    for (std::size_t position = 0; position < text.tokens.size(); position += 3) {
        text.tokens[position] += std::int64_t{1} << 32U;
    }
    text.tokens[1] = std::numeric_limits<std::int64_t>::min();
    text.tokens[2] = std::numeric_limits<std::int64_t>::max();
    const Answer expected = oracle_lookup(keys, text, 4);
    const Answer found = native_lookup<std::int64_t>(index, text);
    CHECK_FOR(found == expected, first_difference(found, expected));
    // An end-of-document id beyond 32 bits is not one of the ids that share its low half.
    text.eod = (std::int64_t{1} << 32U) + 2;
    const Answer with_eod = native_lookup<std::int64_t>(index, text);
    CHECK(with_eod == oracle_lookup(keys, text, 4));
}

TEST("no n-gram holds the end of a document or crosses it, even if it is a key") {
    const KeySet keys = alphabet_keys(5);
    for (std::int64_t eod = -2; eod <= 5; ++eod) {
        Text text = alphabet_text(900, 90, 9);
        text.eod = eod;
        check_text(keys, 4, text);
    }
}

TEST("no n-gram crosses a document start at any distance") {
    const KeySet keys = alphabet_keys(8);
    for (std::size_t spacing = 1; spacing <= 12; ++spacing) {
        Text text = alphabet_text(spacing * 50, spacing * 25, 10);
        text.document_starts.assign(text.tokens.size(), 0);
        for (std::size_t position = 0; position < text.tokens.size(); position += spacing) {
            text.document_starts[position] = static_cast<std::uint8_t>(1 + position % 255);
        }
        check_text(keys, 4, text);
        text.eod = 1;
        check_text(keys, 4, text);
    }
}

TEST("a row limit answers as the bank of the first keys") {
    Random random(11);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        const TestBank bank = make_bank(random, shape, 40);
        const AlignedBytes file = build_bytes(bank.keys, bank.vocab_size);
        const Text text = make_text(random, bank, 1, 500);
        for (std::size_t limit = 1; limit <= bank.keys.size(); limit += 1 + limit / 4) {
            KeySet first;
            for (std::size_t row = 0; row < limit; ++row) {
                first.add(bank.keys.keys()[row]);
            }
            const AlignedBytes small = build_bytes(first, bank.vocab_size);
            const Answer expected = native_lookup<std::int32_t>(SuffixIndex(small.bytes()), text);
            for (const Body body : available_bodies()) {
                const Answer found =
                    native_lookup<std::int32_t>(SuffixIndex(file.bytes(), limit, body), text);
                CHECK_FOR(found == expected, bank.shape + ": " + first_difference(found, expected));
            }
        }
    }
}

TEST("row limits of nothing, of everything and beyond are honoured") {
    const KeySet keys = alphabet_keys(4);
    const std::uint64_t rows = keys.size();
    check_text(
        keys, 4, alphabet_text(600, 100, 12),
        {0, 1, rows - 1, rows, rows + 1, kMaxNodes, 1ULL << 32U, std::numeric_limits<std::uint64_t>::max()});
}

TEST("any number of threads of a pool give the same answers") {
    const KeySet keys = alphabet_keys(8);
    const AlignedBytes file = build_bytes(keys, 4);
    const Text text = alphabet_text(60'000, 1000, 13);
    const Answer expected = oracle_lookup(keys, text, 4);
    for (const unsigned threads : {1U, 2U, 3U, 8U}) {
        const ThreadPool pool(threads);
        for (const Body body : available_bodies()) {
            const SuffixIndex index(file.bytes(), kMaxNodes, body);
            CHECK(native_lookup<std::int32_t>(index, text, pool) == expected);
            CHECK(native_lookup<std::int64_t>(index, text, pool) == expected);
        }
    }
}

TEST("many callers at once, sharing one index and one pool, get the right answers") {
    const KeySet keys = alphabet_keys(8);
    const AlignedBytes file = build_bytes(keys, 4);
    const SuffixIndex index(file.bytes());
    const ThreadPool pool(3);
    std::vector<Text> texts;
    std::vector<Answer> expected;
    for (std::uint64_t caller = 0; caller < 8; ++caller) {
        texts.push_back(alphabet_text(20'000, 500, 100 + caller));
        expected.push_back(oracle_lookup(keys, texts.back(), 4));
    }
    std::atomic<int> wrong = 0;
    std::vector<std::thread> callers;
    for (std::size_t caller = 0; caller < texts.size(); ++caller) {
        callers.emplace_back([&, caller] {
            for (int round = 0; round < 5; ++round) {
                wrong += native_lookup<std::int32_t>(index, texts[caller], pool) == expected[caller] ? 0 : 1;
            }
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
    CHECK_EQUAL(wrong.load(), 0);
}

TEST("spans of unequal length and incomplete sequences are refused") {
    const AlignedBytes file = build_bytes(alphabet_keys(3), 4);
    const SuffixIndex index(file.bytes());
    const std::vector<std::int32_t> tokens(12, 1);
    const std::vector<std::uint8_t> starts(11);
    std::vector<std::int64_t> rows(12, -5);
    std::vector<std::uint8_t> orders(12);
    const auto call = [&](std::size_t length, std::size_t row_count, std::size_t order_count,
                          bool with_starts) {
        const std::span<const std::uint8_t> given =
            with_starts ? std::span(starts) : std::span(starts).first(0);
        index.lookup(TokenBatch<std::int32_t>{tokens, length, given, {}},
                     Matches{std::span(rows).first(row_count), std::span(orders).first(order_count)},
                     one_thread());
    };
    CHECK_THROWS(std::invalid_argument, call(0, 12, 12, false), "sequences");
    CHECK_THROWS(std::invalid_argument, call(5, 12, 12, false), "sequences");
    CHECK_THROWS(std::invalid_argument, call(24, 12, 12, false), "sequences");
    CHECK_THROWS(std::invalid_argument, call(4, 11, 12, false), "length");
    CHECK_THROWS(std::invalid_argument, call(4, 12, 11, false), "length");
    CHECK_THROWS(std::invalid_argument, call(4, 12, 12, true), "length");
    CHECK(rows == std::vector<std::int64_t>(12, -5));
}

TEST("bytes that do not start on a cache line are refused") {
    const AlignedBytes file = build_bytes(alphabet_keys(3), 4);
    AlignedBytes shifted(file.bytes().size() + 8);
    std::memcpy(shifted.bytes().data() + 8, file.bytes().data(), file.bytes().size());
    const AlignedBytes& view = shifted;
    CHECK_THROWS(std::invalid_argument, SuffixIndex(view.bytes().subspan(8)), "cache line");
}

TEST("the entries counted are rows and phantoms") {
    Random random(14);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        const TestBank bank = make_bank(random, shape, 200);
        const AlignedBytes file = build_bytes(bank.keys, bank.vocab_size);
        const SuffixIndex index(file.bytes());
        const SuffixIndex::Contents contents = index.count_contents();
        std::vector<std::uint64_t> expected;
        if (index.header().min_order == 1) {
            expected.push_back(index.header().unigrams);
        }
        for (const IndexLevel& level : index.header().levels) {
            expected.push_back(level.entries);
        }
        CHECK_EQUAL(contents.entries.size(), expected.size());
        std::uint64_t counted = 0;
        for (std::size_t section = 0; section < expected.size(); ++section) {
            CHECK_EQUAL(contents.entries[section], expected[section]);
            counted += contents.entries[section];
        }
        CHECK_EQUAL(contents.rows, bank.keys.size());
        CHECK_EQUAL(counted, bank.keys.size() + bank.keys.phantoms());
        CHECK_EQUAL(index.header().phantoms, bank.keys.phantoms());
    }
}

}  // namespace
}  // namespace megatron_graft::testing
