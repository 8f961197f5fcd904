// From keys to the bytes of an index, and from a text to its answers.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "index_builder.hpp"
#include "keys.hpp"
#include "oracle.hpp"
#include "scratch.hpp"
#include "suffix_index.hpp"
#include "thread_pool.hpp"

namespace megatron_graft::testing {

inline constexpr std::array<Body, 4> kAllBodies = {Body::kPlain, Body::kPortable, Body::kAvx2, Body::kAvx512};

inline std::vector<Body> available_bodies() {
    std::vector<Body> bodies;
    for (const Body body : kAllBodies) {
        if (body_available(body)) {
            bodies.push_back(body);
        }
    }
    return bodies;
}

// Some identity; its bytes are all different.
inline IndexIdentity test_identity() {
    IndexIdentity identity{};
    for (std::size_t index = 0; index < identity.tokenizer_sha256.size(); ++index) {
        identity.tokenizer_sha256[index] = static_cast<std::uint8_t>(index + 1);
        identity.keys_sha256[index] = static_cast<std::uint8_t>(index + 101);
    }
    return identity;
}

inline IndexHeader write_index(const std::filesystem::path& path, const KeySet& keys,
                               std::uint64_t vocab_size, const BuildOptions& options = {}) {
    const PackedKeys packed(keys);
    return build_index(path, packed.table(), vocab_size, test_identity(), options);
}

inline AlignedBytes build_bytes(const KeySet& keys, std::uint64_t vocab_size,
                                const BuildOptions& options = {}) {
    const ScratchDirectory scratch;
    write_index(scratch / "index.qbt", keys, vocab_size, options);
    return read_file(scratch / "index.qbt");
}

inline const ThreadPool& one_thread() {
    static const ThreadPool pool(1);
    return pool;
}

// The answers of the index. They are written over values that no lookup gives, so that a position left out
// shows.
template <typename IdType>
Answer native_lookup(const SuffixIndex& index, const Text& text, const ThreadPool& pool = one_thread()) {
    const std::vector<IdType> tokens(text.tokens.begin(), text.tokens.end());
    Answer answer(tokens.size());
    std::fill(answer.rows.begin(), answer.rows.end(), -7);
    std::fill(answer.orders.begin(), answer.orders.end(), std::uint8_t{77});
    index.lookup(TokenBatch<IdType>{tokens, text.length, text.document_starts, text.eod},
                 Matches{answer.rows, answer.orders}, pool);
    return answer;
}

// The same answers one token at a time: the n-th tokens of all sequences together. Document starts are
// restarts.
template <typename IdType>
Answer stepped_lookup(const SuffixIndex& index, const Text& text) {
    const std::size_t sequences = text.tokens.size() / text.length;
    SuffixState state(sequences, index.header().max_order);
    Answer all(text.tokens.size());
    Answer answer(sequences);
    std::vector<IdType> tokens(sequences);
    for (std::size_t place = 0; place < text.length; ++place) {
        for (std::size_t sequence = 0; sequence < sequences; ++sequence) {
            const std::size_t position = sequence * text.length + place;
            tokens[sequence] = static_cast<IdType>(text.tokens[position]);
            if (!text.document_starts.empty() && text.document_starts[position] != 0) {
                state.restart(sequence);
            }
        }
        std::fill(answer.rows.begin(), answer.rows.end(), -7);
        std::fill(answer.orders.begin(), answer.orders.end(), std::uint8_t{77});
        index.step(state, std::span<const IdType>(tokens), text.eod, Matches{answer.rows, answer.orders});
        for (std::size_t sequence = 0; sequence < sequences; ++sequence) {
            all.rows[sequence * text.length + place] = answer.rows[sequence];
            all.orders[sequence * text.length + place] = answer.orders[sequence];
        }
    }
    return all;
}

// Where two answers differ first, with both: for the message of a failed check.
inline std::string first_difference(const Answer& found, const Answer& expected) {
    for (std::size_t position = 0; position < expected.rows.size(); ++position) {
        if (found.rows[position] != expected.rows[position] ||
            found.orders[position] != expected.orders[position]) {
            return "position " + std::to_string(position) + ": row " + std::to_string(found.rows[position]) +
                   " of order " + std::to_string(found.orders[position]) + ", expected row " +
                   std::to_string(expected.rows[position]) + " of order " +
                   std::to_string(expected.orders[position]);
        }
    }
    return "no difference";
}

}  // namespace megatron_graft::testing
