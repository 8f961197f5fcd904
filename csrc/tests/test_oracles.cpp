// The oracles themselves: the plain one on cases worked out by hand, the fast one against the plain one.
#include "check.hpp"
#include "fast_oracle.hpp"
#include "oracle.hpp"
#include "shapes.hpp"

namespace megatron_graft::testing {
namespace {

Answer answers(std::vector<std::int64_t> rows, std::vector<std::uint8_t> orders) {
    Answer answer(0);
    answer.rows = std::move(rows);
    answer.orders = std::move(orders);
    return answer;
}

KeySet small_keys() {
    KeySet keys;
    keys.add({1, 2});
    keys.add({7, 1, 2});
    keys.add({2});
    keys.add({2, 2, 2, 2});
    return keys;
}

TEST("the oracle finds the longest key and stops at sequence and document starts") {
    const KeySet keys = small_keys();
    CHECK(oracle_lookup(keys, {{7, 1, 2, 2, 2, 2}, 6, {}, {}}, 8) ==
          answers({-1, -1, 1, 2, 2, 3}, {0, 0, 3, 1, 1, 4}));
    CHECK(oracle_lookup(keys, {{7, 1, 2, 2, 2, 2}, 2, {}, {}}, 8) ==
          answers({-1, -1, 2, 2, 2, 2}, {0, 0, 1, 1, 1, 1}));
    CHECK(oracle_lookup(keys, {{7, 1, 2, 2, 2, 2}, 6, {0, 1, 0, 0, 0, 0}, {}}, 8) ==
          answers({-1, -1, 0, 2, 2, 3}, {0, 0, 2, 1, 1, 4}));
}

TEST(
    "the oracle gives nothing for the end of a document, for ids outside the vocabulary and for rows beyond "
    "the limit") {
    const KeySet keys = small_keys();
    CHECK(oracle_lookup(keys, {{7, 1, 2, 2, 2, 2}, 6, {}, 7}, 8) ==
          answers({-1, -1, 0, 2, 2, 3}, {0, 0, 2, 1, 1, 4}));
    CHECK(oracle_lookup(keys, {{7, 1, 2, -1, 9, 2}, 6, {}, 1}, 8) ==
          answers({-1, -1, 2, -1, -1, 2}, {0, 0, 1, 0, 0, 1}));
    CHECK(oracle_lookup(keys, {{7, 1, 2}, 3, {}, {}}, 8, 1) == answers({-1, -1, 0}, {0, 0, 2}));
    CHECK(oracle_lookup(keys, {{7, 1, 2}, 3, {}, {}}, 2) == answers({-1, -1, -1}, {0, 0, 0}));
}

TEST("both oracles agree on banks and texts of every shape") {
    Random random(1);
    std::size_t hits = 0;
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        for (std::size_t text_shape = 0; text_shape < kTextShapes.size(); ++text_shape) {
            const TestBank bank = make_bank(random, shape, random.between(1, 60));
            const Text text = make_text(random, bank, text_shape, 400);
            const std::uint64_t limit = random.one_in(2) ? random.below(bank.keys.size() + 2) : ~0ULL;
            const Answer expected = oracle_lookup(bank.keys, text, bank.vocab_size, limit);
            Answer found(text.tokens.size());
            FastOracle(bank.keys, bank.vocab_size).lookup(text, 0, text.tokens.size(), limit, found);
            CHECK_FOR(found == expected, bank.shape + ", " + kTextShapes[text_shape]);
            for (const std::uint8_t order : expected.orders) {
                hits += order > 1 ? 1 : 0;
            }
        }
    }
    CHECK(hits > 1000);
}

}  // namespace
}  // namespace megatron_graft::testing
