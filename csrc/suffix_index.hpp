// Exact longest-suffix lookup: for every position of a token sequence, the row of the longest known n-gram
// that ends there.
//
// The index is a trie over n-grams read backwards, one hash table an order, laid out so that the place and
// the 26 stored bits of a lane determine its key (docs/format.md): no collision is possible and no key is
// touched.
//
// Nothing here knows Python. An index does not change: any number of threads may look up in it at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "body.hpp"
#include "index_format.hpp"
#include "thread_pool.hpp"
#include "walk.hpp"

namespace megatron_graft {

inline constexpr std::int64_t kMiss = -1;

// B sequences of `length` tokens, one after the other. `document_starts` is empty, or holds a non-zero byte
// wherever a document starts in addition to first positions and to those after an end-of-document token.
template <typename Token>
struct TokenBatch {
    std::span<const Token> tokens;
    std::size_t length;
    std::span<const std::uint8_t> document_starts;
    std::optional<std::int64_t> eod;
};

// The answers by position: row (kMiss) and order (0 at a miss).
struct Matches {
    std::span<std::int64_t> rows;
    std::span<std::uint8_t> orders;
};

// What generation has to remember of B sequences between tokens: the newest tokens of each and how many of
// them, its own included, an n-gram that ends there may have.
class SuffixState {
  public:
    SuffixState(std::size_t sequences, std::size_t max_order)
        : max_order_(max_order), tokens_(sequences * max_order), reach_(sequences) {}

    [[nodiscard]] std::size_t sequences() const { return reach_.size(); }

    // Sequence i becomes what sequence `parents[i]` was (beam search); the number of sequences may change.
    // Throws std::out_of_range if there is no such sequence; nothing has changed then.
    void reorder(std::span<const std::int64_t> parents);

    // The next token of sequence `index` starts a document.
    void restart(std::size_t index) { reach_.at(index) = 0; }

  private:
    friend class SuffixIndex;

    std::size_t max_order_;
    std::vector<std::uint32_t> tokens_;  // [sequences, max_order], newest last
    std::vector<std::uint8_t> reach_;    // [sequences]
};

class SuffixIndex {
  public:
    // A view of an index file; the caller keeps the bytes where they are. Only rows below `row_limit` are
    // answers: a longer match that has a higher row is passed over for the longest one that has not.
    // Throws FormatError if the bytes are no sound index, std::invalid_argument if the machine lacks `body`.
    explicit SuffixIndex(std::span<const std::byte> file, std::uint64_t row_limit = kMaxNodes,
                         Body body = Body::kAuto);

    [[nodiscard]] const IndexHeader& header() const { return header_; }

    // Looks up every position. Tokens below 0, at or above the vocabulary size, or equal to eod are part of
    // no n-gram, and none reaches across a document's start. Throws std::invalid_argument if the spans differ
    // in length or are not whole sequences.
    template <typename Token>
    void lookup(const TokenBatch<Token>& batch, Matches matches, const ThreadPool& pool) const;

    // Appends one token to every sequence of `state` and looks it up: the same answers as lookup() on the
    // whole sequences. Throws std::invalid_argument if the spans are not one per sequence.
    template <typename Token>
    void step(SuffixState& state, std::span<const Token> tokens, std::optional<std::int64_t> eod,
              Matches matches) const;

    // What the sections hold, by counting: reads the whole file.
    struct Contents {
        std::vector<std::uint64_t> entries;  // by section
        std::uint64_t rows;                  // entries that are rows
    };
    [[nodiscard]] Contents count_contents() const;

  private:
    class Reaches;

    template <typename Token>
    void lookup_range(const TokenBatch<Token>& batch, std::size_t begin, std::size_t end,
                      Matches matches) const;
    [[nodiscard]] bool usable(std::int64_t token, const std::optional<std::int64_t>& eod) const;

    IndexHeader header_;
    WalkTables tables_{};
    WalkFunction walk_;
};

}  // namespace megatron_graft
