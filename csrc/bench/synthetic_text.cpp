#include "synthetic_text.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <stdexcept>

#include "measure.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::size_t kSegmentTokens = 4U << 20U;  // generated on its own; ends with EOD
constexpr std::size_t kQuantileBits = 20;
constexpr std::size_t kLongestContext = 6;
constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;

// Tokens by quantile of a Zipf-Mandelbrot distribution: a uniform number picks one with its frequency.
std::vector<std::int32_t> zipf_quantiles(std::uint32_t vocab_size) {
    std::vector<double> cumulative(vocab_size);
    double sum = 0;
    for (std::uint32_t rank = 0; rank < vocab_size; ++rank) {
        sum += 1.0 / std::pow(rank + 2.7, 1.02);
        cumulative[rank] = sum;
    }
    std::vector<std::int32_t> tokens(std::size_t{1} << kQuantileBits);
    std::uint32_t rank = 0;
    for (std::size_t quantile = 0; quantile < tokens.size(); ++quantile) {
        const double level = sum * (static_cast<double>(quantile) + 0.5) / static_cast<double>(tokens.size());
        while (cumulative[rank] < level) {
            ++rank;
        }
        tokens[quantile] = static_cast<std::int32_t>(1 + rank % (vocab_size - 1));
    }
    return tokens;
}

// One stretch of text. At every position it ends the document, goes on with a phrase, starts a phrase, or
// draws a token whose distribution is fixed by a context of 0 to 6 tokens.
class Writer {
  public:
    Writer(std::span<const std::int32_t> quantiles, std::uint64_t seed)
        : quantiles_(quantiles), state_(seed) {}

    void write(std::span<std::int32_t> text) {
        std::size_t document = 0;
        for (std::size_t at = 0; at + 1 < text.size(); ++at) {
            state_ += kGolden;
            const std::uint64_t random = scatter(state_);
            if ((random & 1023U) == 0) {
                text[at] = kEod;
                document = at + 1;
                phrase_left_ = 0;
            } else {
                text[at] = next_token(random, text.first(at).subspan(document));
            }
        }
        text.back() = kEod;
    }

  private:
    std::int32_t pick(std::uint64_t scattered) const {
        return quantiles_[scattered >> (64U - kQuantileBits)];
    }
    std::int32_t phrase_token() { return pick(scatter(phrase_ * 64 + phrase_at_++)); }

    std::int32_t next_token(std::uint64_t random, std::span<const std::int32_t> document) {
        const double uniform = static_cast<double>((random >> 20U) + 1) * 0x1p-44;
        if (phrase_left_ > 0) {
            --phrase_left_;
            return phrase_token();
        }
        if (((random >> 10U) & 1023U) < 100) {
            start_phrase(uniform);
            return phrase_token();
        }
        const std::size_t context = std::min(context_length((random >> 10U) & 255U), document.size());
        return context == 0 ? pick(scatter(random)) : token_after(document.last(context), uniform);
    }

    // 3 to 13 tokens that always come together; few phrases are frequent and most are rare.
    void start_phrase(double uniform) {
        phrase_ = scatter(static_cast<std::uint64_t>(std::min(4e8, std::pow(uniform, -1.9))) + 77);
        phrase_at_ = 0;
        phrase_left_ = 2 + (phrase_ & 3U) + ((phrase_ >> 2U) & 7U) * ((phrase_ >> 5U) & 1U);
    }

    static std::size_t context_length(std::uint64_t percentile) {
        constexpr std::array<std::uint64_t, kLongestContext> kBelow = {56, 104, 150, 190, 222, 242};
        return static_cast<std::size_t>(std::upper_bound(kBelow.begin(), kBelow.end(), percentile) -
                                        kBelow.begin());
    }

    // The longer the context, the fewer tokens are likely after it.
    std::int32_t token_after(std::span<const std::int32_t> context, double uniform) const {
        constexpr std::array<double, kLongestContext + 1> kSpread = {0, 1.6, 1.3, 1.1, 0.9, 0.8, 0.7};
        std::uint64_t hash = context.size() * 0x9e37U;
        for (std::size_t age = 1; age <= context.size(); ++age) {
            hash = scatter(hash ^ (static_cast<std::uint64_t>(context[context.size() - age]) << 8U)) + age;
        }
        const double rank = std::min(1e9, std::pow(uniform, -kSpread[context.size()]));
        return pick(scatter(hash + static_cast<std::uint64_t>(rank) * kGolden));
    }

    std::span<const std::int32_t> quantiles_;
    std::uint64_t state_;
    std::uint64_t phrase_ = 0;
    std::uint64_t phrase_at_ = 0;
    std::uint64_t phrase_left_ = 0;
};

}  // namespace

std::vector<std::int32_t> synthetic_text(const TextOptions& options, const ThreadPool& pool) {
    if (options.vocab_size < 2 || options.tokens == 0) {
        throw std::invalid_argument("a text needs a token besides EOD, and a length");
    }
    const std::vector<std::int32_t> quantiles = zipf_quantiles(options.vocab_size);
    std::vector<std::int32_t> text(options.tokens);
    const std::size_t segments = (text.size() + kSegmentTokens - 1) / kSegmentTokens;
    pool.for_ranges(segments, 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t segment = begin; segment < end; ++segment) {
            const std::size_t start = segment * kSegmentTokens;
            const std::size_t length = std::min(kSegmentTokens, text.size() - start);
            Writer writer(quantiles, scatter(options.seed + (segment << 32U)));
            writer.write(std::span(text).subspan(start, length));
        }
    });
    return text;
}

}  // namespace megatron_graft::bench
