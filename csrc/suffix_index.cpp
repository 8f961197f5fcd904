#include "suffix_index.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "checked.hpp"

namespace megatron_graft {
namespace {

constexpr std::size_t kHistory = kMaxOrder - 1;

WalkFunction walk_of(Body body) {
    switch (body) {
        case Body::kPlain:
            return walk_plain;
#if defined(__x86_64__)
        case Body::kAvx2:
            return walk_avx2;
        case Body::kAvx512:
            return walk_avx512;
#endif
        default:
            return walk_portable;
    }
}

void require(bool condition, const char* message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

}  // namespace

void SuffixState::reorder(std::span<const std::int64_t> parents) {
    std::vector<std::uint32_t> tokens(parents.size() * max_order_);
    std::vector<std::uint8_t> reach(parents.size());
    for (std::size_t index = 0; index < parents.size(); ++index) {
        if (parents[index] < 0 || static_cast<std::size_t>(parents[index]) >= sequences()) {
            throw std::out_of_range("sequence " + std::to_string(parents[index]) + " of " +
                                    std::to_string(sequences()));
        }
        const auto parent = static_cast<std::size_t>(parents[index]);
        std::copy_n(tokens_.begin() + static_cast<std::ptrdiff_t>(parent * max_order_), max_order_,
                    tokens.begin() + static_cast<std::ptrdiff_t>(index * max_order_));
        reach[index] = reach_[parent];
    }
    tokens_ = std::move(tokens);
    reach_ = std::move(reach);
}

SuffixIndex::SuffixIndex(std::span<const std::byte> file, std::uint64_t row_limit, Body body)
    : header_(parse_index_header(file)), walk_(walk_of(body == Body::kAuto ? widest_body() : body)) {
    require(body_available(body), "this machine lacks the instructions asked for");
    require(reinterpret_cast<std::uintptr_t>(file.data()) % alignof(Bucket) == 0,
            "an index must start on a cache line");
    tables_.max_order = header_.max_order;
    tables_.token_bits = header_.token_bits();
    tables_.key_bits = header_.key_bits();
    tables_.row_limit = static_cast<std::uint32_t>(std::min(row_limit, header_.rows));
    if (header_.unigrams_offset != 0) {
        tables_.unigrams = reinterpret_cast<const std::uint32_t*>(file.data() + header_.unigrams_offset);
    }
    for (const IndexLevel& level : header_.levels) {
        tables_.levels[level.order] = {reinterpret_cast<const Bucket*>(file.data() + level.offset),
                                       level.buckets};
    }
}

bool SuffixIndex::usable(std::int64_t token, const std::optional<std::int64_t>& eod) const {
    return token >= 0 && static_cast<std::uint64_t>(token) < header_.vocab_size && token != eod;
}

template <typename Token>
void SuffixIndex::lookup(const TokenBatch<Token>& batch, Matches matches, const ThreadPool& pool) const {
    const std::size_t positions = batch.tokens.size();
    require(matches.rows.size() == positions && matches.orders.size() == positions &&
                (batch.document_starts.empty() || batch.document_starts.size() == positions),
            "tokens, document_starts and outputs differ in length");
    require(batch.length == 0 ? positions == 0 : positions % batch.length == 0,
            "tokens are not whole sequences");
    pool.for_ranges(positions, 4 * kWalkBlock, [&](std::size_t begin, std::size_t end) {
        for (std::size_t block = begin; block < end; block += kWalkBlock) {
            lookup_range(batch, block, std::min(end, block + kWalkBlock), matches);
        }
    });
}

// Where the walk may begin and how far it may go, for one block of positions and a few before it. Byte by
// byte and without a branch, so that the compiler does many positions at once.
class SuffixIndex::Reaches {
  public:
    // Reads `count` tokens; `eod` is -1 if there is none.
    template <typename Token>
    void read(const Token* tokens, std::size_t count, std::uint64_t vocab_size, std::int64_t eod) {
        count_ = count;
        for (std::size_t index = 0; index < count; ++index) {
            const std::int64_t token = tokens[index];
            // A negative token is a huge one without its sign.
            usable_[index] = static_cast<std::uint8_t>(
                static_cast<unsigned>(static_cast<std::uint64_t>(token) < vocab_size) &
                static_cast<unsigned>(token != eod));
            tokens_[index] = static_cast<std::uint32_t>(token);
        }
        joined_[0] = 0;
        for (std::size_t index = 1; index < count; ++index) {
            joined_[index] = usable_[index] & usable_[index - 1];
        }
    }

    // A document starts wherever `starts` is not zero; one byte for each token that was read.
    void part_at(const std::uint8_t* starts) {
        for (std::size_t index = 1; index < count_; ++index) {
            joined_[index] &= static_cast<std::uint8_t>(starts[index] == 0);
        }
    }

    void part_at(std::size_t index) { joined_[index] = 0; }

    // Counts, for each token, itself if it is usable and the tokens before it that are joined to it.
    void count(std::size_t max_order) {
        reach_ = usable_;
        run_ = joined_;
        for (std::size_t age = 1; age < max_order; ++age) {
            for (std::size_t index = 0; index < count_; ++index) {
                reach_[index] = static_cast<std::uint8_t>(reach_[index] + run_[index]);
            }
            for (std::size_t index = age; index < count_; ++index) {
                run_[index] &= joined_[index - age];
            }
        }
    }

    [[nodiscard]] const std::uint32_t* tokens() const { return tokens_.data(); }
    [[nodiscard]] const std::uint8_t* reach() const { return reach_.data(); }

  private:
    using Bytes = std::array<std::uint8_t, kHistory + kWalkBlock>;

    std::size_t count_ = 0;
    std::array<std::uint32_t, kHistory + kWalkBlock> tokens_;
    Bytes usable_;
    Bytes joined_;  // with the token before, in one document
    Bytes run_;
    Bytes reach_;
};

template <typename Token>
void SuffixIndex::lookup_range(const TokenBatch<Token>& batch, std::size_t begin, std::size_t end,
                               Matches matches) const {
    // A few positions before the block say how far back its first ones reach.
    const std::size_t first = begin - std::min(begin, kHistory);
    Reaches reaches;
    reaches.read(batch.tokens.data() + first, end - first, header_.vocab_size, batch.eod.value_or(-1));
    if (!batch.document_starts.empty()) {
        reaches.part_at(batch.document_starts.data() + first);
    }
    const std::size_t length = batch.length;
    for (std::size_t start = (first + length - 1) / length * length; start < end; start += length) {
        reaches.part_at(start - first);
    }
    reaches.count(header_.max_order);
    const std::size_t lead = begin - first;
    walk_(tables_, {reaches.tokens() + lead, reaches.reach() + lead, 1, end - begin,
                    matches.rows.data() + begin, matches.orders.data() + begin});
}

template <typename Token>
void SuffixIndex::step(SuffixState& state, std::span<const Token> tokens, std::optional<std::int64_t> eod,
                       Matches matches) const {
    const std::size_t sequences = state.sequences();
    const std::size_t width = state.max_order_;
    require(width == header_.max_order, "the state belongs to another index");
    require(
        tokens.size() == sequences && matches.rows.size() == sequences && matches.orders.size() == sequences,
        "tokens and outputs are not one per sequence");
    for (std::size_t index = 0; index < sequences; ++index) {
        std::uint32_t* const oldest = state.tokens_.data() + index * width;
        std::copy(oldest + 1, oldest + width, oldest);
        oldest[width - 1] = static_cast<std::uint32_t>(tokens[index]);
        std::uint8_t& reach = state.reach_[index];
        const auto longer = static_cast<std::uint8_t>(std::min<std::size_t>(reach + std::size_t{1}, width));
        reach = usable(tokens[index], eod) ? longer : std::uint8_t{0};
    }
    for (std::size_t begin = 0; begin < sequences; begin += kWalkBlock) {
        walk_(tables_, {state.tokens_.data() + begin * width + width - 1, state.reach_.data() + begin, width,
                        std::min(kWalkBlock, sequences - begin), matches.rows.data() + begin,
                        matches.orders.data() + begin});
    }
}

SuffixIndex::Contents SuffixIndex::count_contents() const {
    Contents contents{};
    if (tables_.unigrams != nullptr) {
        const std::span rows(tables_.unigrams, header_.vocab_size);
        const auto taken =
            std::count_if(rows.begin(), rows.end(), [](std::uint32_t row) { return row != kNoRow; });
        contents.entries.push_back(static_cast<std::uint64_t>(taken));
        contents.rows += static_cast<std::uint64_t>(taken);
    }
    for (const IndexLevel& level : header_.levels) {
        std::uint64_t entries = 0;
        for (const Bucket& bucket :
             std::span(tables_.levels[level.order].buckets, level.buckets + kGuardBuckets)) {
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                const bool taken = bucket.words[lane] != kEmptyWord;
                entries += taken ? 1U : 0U;
                contents.rows += taken && bucket.ids[lane] < header_.rows ? 1U : 0U;
            }
        }
        contents.entries.push_back(entries);
    }
    return contents;
}

template void SuffixIndex::lookup(const TokenBatch<std::int32_t>&, Matches, const ThreadPool&) const;
template void SuffixIndex::lookup(const TokenBatch<std::int64_t>&, Matches, const ThreadPool&) const;
template void SuffixIndex::step(SuffixState&, std::span<const std::int32_t>, std::optional<std::int64_t>,
                                Matches) const;
template void SuffixIndex::step(SuffixState&, std::span<const std::int64_t>, std::optional<std::int64_t>,
                                Matches) const;

}  // namespace megatron_graft
