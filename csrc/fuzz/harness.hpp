// What both fuzz targets do with an index whose body they do not trust.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "fuzz/input.hpp"
#include "suffix_index.hpp"
#include "tests/built_index.hpp"
#include "tests/oracle.hpp"

namespace megatron_graft::fuzz {

// A finding: the fuzzer keeps the input.
[[noreturn]] inline void found(const std::string& problem) {
    std::fprintf(stderr, "FOUND: %s\n", problem.c_str());
    std::abort();
}

// Tokens, lengths, document starts and an end-of-document id from the rest of the input.
inline testing::Text take_text(Input& input, std::uint64_t vocab_size) {
    testing::Text text;
    text.length = 1 + input.below(40);
    const std::uint8_t options = input.byte();
    if ((options & 1U) != 0) {
        // One below the vocabulary and some beyond it are among these.
        text.eod = static_cast<std::int64_t>(input.below(vocab_size + 3)) - 1;
    }
    const std::size_t sequences = 1 + input.left() / ((options & 2U) != 0 ? 4 : 1) / text.length;
    for (std::size_t position = 0; position < sequences * text.length; ++position) {
        const std::uint64_t drawn = (options & 2U) != 0 ? input.number(4) : input.byte();
        const bool outside = (options & 4U) != 0 && drawn % 11 == 0;
        text.tokens.push_back(outside ? static_cast<std::int32_t>(drawn)
                                      : static_cast<std::int64_t>(drawn % vocab_size));
        if ((options & 8U) != 0) {
            text.document_starts.push_back(drawn % 7 == 0 ? 1 : 0);
        }
    }
    return text;
}

// Whatever the body of the file says: answers are rows below the limit, with an order that they can have.
inline void check_answers(const testing::Answer& answer, const SuffixIndex& index, std::uint64_t row_limit) {
    const IndexHeader& header = index.header();
    for (std::size_t position = 0; position < answer.rows.size(); ++position) {
        const std::int64_t row = answer.rows[position];
        const bool hit = answer.orders[position] != 0;
        if (hit != (row >= 0) || row < -1 ||
            row >= static_cast<std::int64_t>(std::min(header.rows, row_limit)) ||
            answer.orders[position] > header.max_order) {
            found("position " + std::to_string(position) + " has row " + std::to_string(row) + " of order " +
                  std::to_string(answer.orders[position]));
        }
    }
}

// The plain walk and one other, both widths of ids and the incremental lookup on one file: no wild access,
// sound answers, and all the same.
inline void look_up_everything(std::span<const std::byte> file, const testing::Text& text,
                               std::uint64_t row_limit, Body body) {
    const SuffixIndex plain(file, row_limit, Body::kPlain);
    const testing::Answer expected = testing::native_lookup<std::int64_t>(plain, text);
    check_answers(expected, plain, row_limit);
    const SuffixIndex index(file, row_limit, body);
    for (const testing::Answer& answer : {testing::native_lookup<std::int32_t>(index, text),
                                          testing::stepped_lookup<std::int32_t>(index, text)}) {
        if (answer != expected) {
            found("two lookups differ: " + testing::first_difference(answer, expected));
        }
    }
}

// One of the bodies that this machine can run.
inline Body take_body(Input& input) {
    static const std::vector<Body> bodies = testing::available_bodies();
    return bodies[input.below(bodies.size())];
}

}  // namespace megatron_graft::fuzz
