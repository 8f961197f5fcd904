// One token at a time gives the answers of whole sequences.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "built_index.hpp"
#include "check.hpp"
#include "shapes.hpp"
#include "suffix_index.hpp"

namespace megatron_graft::testing {
namespace {

TEST("steps answer as the whole-sequence lookup does, for every shape and body") {
    Random random(40);
    for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
        for (std::size_t text_shape = 0; text_shape < kTextShapes.size(); ++text_shape) {
            const TestBank bank = make_bank(random, shape, random.between(1, 60));
            const AlignedBytes file = build_bytes(bank.keys, bank.vocab_size);
            const std::uint64_t limit = random.one_in(2) ? random.below(bank.keys.size() + 1) : kMaxNodes;
            const Text text = make_text(random, bank, text_shape, 600);
            const Answer expected = oracle_lookup(bank.keys, text, bank.vocab_size, limit);
            for (const Body body : available_bodies()) {
                const SuffixIndex index(file.bytes(), limit, body);
                const Answer narrow = stepped_lookup<std::int32_t>(index, text);
                CHECK_FOR(narrow == expected, bank.shape + ": " + first_difference(narrow, expected));
                CHECK(stepped_lookup<std::int64_t>(index, text) == expected);
            }
        }
    }
}

KeySet runs() {
    KeySet keys;
    for (std::size_t order = 2; order <= 8; ++order) {
        keys.add(Key(order, 1));
        keys.add(Key(order, 2));
    }
    return keys;
}

Answer step_once(const SuffixIndex& index, SuffixState& state, const std::vector<std::int32_t>& tokens) {
    Answer answer(tokens.size());
    index.step(state, std::span<const std::int32_t>(tokens), std::nullopt,
               Matches{answer.rows, answer.orders});
    return answer;
}

TEST("reordered sequences go on from their parents, also when their number changes") {
    const AlignedBytes file = build_bytes(runs(), 3);
    const SuffixIndex index(file.bytes());
    SuffixState state(2, index.header().max_order);
    for (int count = 0; count < 4; ++count) {
        step_once(index, state, {1, 2});
    }
    const std::vector<std::int64_t> parents = {1, 0, 1, 0};
    state.reorder(parents);
    CHECK_EQUAL(state.sequences(), 4U);
    CHECK(step_once(index, state, {2, 1, 1, 2}).orders == std::vector<std::uint8_t>({5, 5, 0, 0}));
    const std::vector<std::int64_t> one = {1};
    state.reorder(one);
    CHECK(step_once(index, state, {1}).orders == std::vector<std::uint8_t>({6}));
}

TEST("a parent that does not exist is refused and the state is as before") {
    const AlignedBytes file = build_bytes(runs(), 3);
    const SuffixIndex index(file.bytes());
    SuffixState state(2, index.header().max_order);
    step_once(index, state, {1, 1});
    for (const std::int64_t wrong : {std::int64_t{-1}, std::int64_t{2}, std::int64_t{1} << 40U}) {
        const std::vector<std::int64_t> parents = {0, wrong, 1};
        CHECK_THROWS(std::out_of_range, state.reorder(parents), std::to_string(wrong));
    }
    CHECK_EQUAL(state.sequences(), 2U);
    CHECK(step_once(index, state, {1, 1}).orders == std::vector<std::uint8_t>({2, 2}));
}

TEST("a restarted sequence forgets, the others do not") {
    const AlignedBytes file = build_bytes(runs(), 3);
    const SuffixIndex index(file.bytes());
    SuffixState state(2, index.header().max_order);
    step_once(index, state, {1, 1});
    step_once(index, state, {1, 1});
    state.restart(0);
    CHECK(step_once(index, state, {1, 1}).orders == std::vector<std::uint8_t>({0, 3}));
    CHECK_THROWS(std::out_of_range, state.restart(2), "");
}

TEST("steps of the wrong number of tokens and states of another index are refused") {
    const AlignedBytes file = build_bytes(runs(), 3);
    const SuffixIndex index(file.bytes());
    SuffixState state(2, index.header().max_order);
    CHECK_THROWS(std::invalid_argument, step_once(index, state, {1}), "one per sequence");
    CHECK_THROWS(std::invalid_argument, step_once(index, state, {1, 1, 1}), "one per sequence");
    SuffixState other(2, 3);
    CHECK_THROWS(std::invalid_argument, step_once(index, other, {1, 1}), "another index");
    SuffixState none(0, index.header().max_order);
    CHECK(step_once(index, none, {}).rows.empty());
}

TEST("a state of an index with a larger vocabulary does no harm") {
    KeySet large;
    for (std::size_t order = 2; order <= 8; ++order) {
        large.add(Key(order, (1 << 20) - 1));
    }
    const AlignedBytes large_file = build_bytes(large, 1U << 20U);
    const AlignedBytes small_file = build_bytes(runs(), 3);
    const SuffixIndex large_index(large_file.bytes());
    const SuffixIndex small_index(small_file.bytes());
    SuffixState state(1, 8);
    for (int count = 0; count < 7; ++count) {
        step_once(large_index, state, {(1 << 20) - 1});
    }
    const Answer answer = step_once(small_index, state, {1});
    CHECK(answer.rows[0] < static_cast<std::int64_t>(small_index.header().rows));
}

}  // namespace
}  // namespace megatron_graft::testing
