// What a lookup must answer, said as plainly as possible: for every position the longest n-gram that ends
// there, crosses no document start, holds no token that is in no n-gram, and is a key. Whole keys in a
// std::map.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "keys.hpp"

namespace megatron_graft::testing {

// Sequences side by side: `tokens` is [B * length], `document_starts` the same or empty.
struct Text {
    std::vector<std::int64_t> tokens;
    std::size_t length = 1;
    std::vector<std::uint8_t> document_starts;
    std::optional<std::int64_t> eod;

    // Whether the position begins a document: nothing before it belongs to an n-gram that ends at or behind
    // it.
    [[nodiscard]] bool starts_document(std::size_t position) const {
        return position % length == 0 || (!document_starts.empty() && document_starts[position] != 0) ||
               (eod.has_value() && tokens[position - 1] == *eod);
    }
};

struct Answer {
    std::vector<std::int64_t> rows;    // -1 at a miss
    std::vector<std::uint8_t> orders;  // 0 at a miss

    explicit Answer(std::size_t positions) : rows(positions, -1), orders(positions, 0) {}
    bool operator==(const Answer&) const = default;
};

inline Answer oracle_lookup(const KeySet& keys, const Text& text, std::uint64_t vocab_size,
                            std::uint64_t row_limit = ~0ULL) {
    Answer answer(text.tokens.size());
    for (std::size_t position = 0; position < text.tokens.size(); ++position) {
        Key newest_first;
        for (std::size_t age = 0; age < keys.max_order(); ++age) {
            const std::int64_t token = text.tokens[position - age];
            if (token < 0 || token >= static_cast<std::int64_t>(vocab_size) || token == text.eod) {
                break;
            }
            newest_first.push_back(static_cast<Token>(token));
            const auto found = keys.rows().find(Key(newest_first.rbegin(), newest_first.rend()));
            if (found != keys.rows().end() && static_cast<std::uint64_t>(found->second) < row_limit) {
                answer.rows[position] = found->second;
                answer.orders[position] = static_cast<std::uint8_t>(newest_first.size());
            }
            if (text.starts_document(position - age)) {
                break;
            }
        }
    }
    return answer;
}

}  // namespace megatron_graft::testing
