#include "ngram_hash.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

namespace megatron_graft {
namespace {

constexpr std::size_t kGrain = 512;  // positions; with 16 heads some twenty microseconds of work

void require(bool condition, const std::string& message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

}  // namespace

Remainder::Remainder(std::int64_t divisor) : divisor_(static_cast<std::uint64_t>(divisor)) {
    require(divisor >= 2, "a modulus is " + std::to_string(divisor) + ", expected 2 or more");
    reciprocal_ = std::numeric_limits<std::uint64_t>::max() / divisor_;
}

NgramHash::NgramHash(const HashConstants& constants)
    : compressed_ids_(constants.compressed_ids.begin(), constants.compressed_ids.end()),
      multipliers_(constants.multipliers.begin(), constants.multipliers.end()),
      heads_of_order_(0),
      pad_(static_cast<std::uint64_t>(constants.pad)),
      eod_(constants.eod) {
    const std::size_t max_order = multipliers_.size();
    require(max_order >= 2 && max_order <= kMaxOrder,
            std::to_string(max_order) + " multipliers, expected 2 to " + std::to_string(kMaxOrder));
    const std::size_t count = constants.primes.size();
    require(count > 0 && count % (max_order - 1) == 0,
            std::to_string(count) + " primes for " + std::to_string(max_order - 1) + " orders");
    require(constants.offsets.size() == count,
            std::to_string(constants.offsets.size()) + " offsets for " + std::to_string(count) + " primes");
    heads_of_order_ = count / (max_order - 1);
    heads_.reserve(count);
    for (std::size_t head = 0; head < count; ++head) {
        const Remainder remainder(constants.primes[head]);  // first: it refuses negative ones
        const std::int64_t offset = constants.offsets[head];
        const std::int64_t highest = std::numeric_limits<std::int64_t>::max() - constants.primes[head];
        require(offset >= 0 && offset <= highest,
                "an offset is " + std::to_string(offset) + ", expected 0 to " + std::to_string(highest));
        heads_.push_back({remainder, offset});
    }
}

template <typename Token>
std::uint64_t NgramHash::compressed(std::span<const Token> tokens, std::size_t place) const {
    const std::int64_t token = tokens[place];
    if (token < 0) {
        return static_cast<std::uint64_t>(token);
    }
    if (static_cast<std::uint64_t>(token) >= compressed_ids_.size()) {
        throw std::out_of_range("token " + std::to_string(place) + " is " + std::to_string(token) +
                                ", outside a vocabulary of " + std::to_string(compressed_ids_.size()));
    }
    return static_cast<std::uint64_t>(std::int64_t{compressed_ids_[static_cast<std::size_t>(token)]});
}

template <typename Token>
void NgramHash::hash_range(std::span<const Token> tokens, std::size_t length, std::size_t begin,
                           std::size_t end, std::int64_t* rows_out) const {
    const std::size_t max_order = multipliers_.size();
    std::array<std::uint64_t, kMaxOrder> ids;  // compressed, by distance back
    ids.fill(pad_);
    // A few tokens before the range are what its first n-grams reach back to. Whatever document starts before
    // those is out of reach.
    std::size_t column = begin % length;
    std::size_t place = begin - std::min(column, max_order - 1);
    column -= begin - place;
    std::int64_t* row = rows_out + begin * heads_.size();
    for (; place < end; ++place) {
        if (column == 0 || (eod_ && tokens[place - 1] == *eod_)) {
            ids.fill(pad_);
        }
        column = column + 1 == length ? 0 : column + 1;
        std::copy_backward(ids.begin(), ids.end() - 1, ids.end());
        ids[0] = compressed(tokens, place);
        if (place < begin) {
            continue;
        }
        const Head* head = heads_.data();
        std::uint64_t mix = ids[0] * multipliers_[0];
        for (std::size_t back = 1; back < max_order; ++back) {
            mix ^= ids[back] * multipliers_[back];
            for (const Head* const last = head + heads_of_order_; head < last; ++head) {
                *row++ = head->offset + head->remainder.of(static_cast<std::int64_t>(mix));
            }
        }
    }
}

template <typename Token>
void NgramHash::rows(std::span<const Token> tokens, std::size_t length, std::span<std::int64_t> rows_out,
                     const ThreadPool& pool) const {
    require(length == 0 ? tokens.empty() : tokens.size() % length == 0, "tokens are not whole sequences");
    // Divided rather than multiplied: the product could wrap.
    require(rows_out.size() % heads_.size() == 0 && rows_out.size() / heads_.size() == tokens.size(),
            "rows_out has " + std::to_string(rows_out.size()) + " places, expected " +
                std::to_string(heads_.size()) + " for each of " + std::to_string(tokens.size()) + " tokens");
    pool.for_ranges(tokens.size(), kGrain, [&](std::size_t begin, std::size_t end) {
        hash_range(tokens, length, begin, end, rows_out.data());
    });
}

template void NgramHash::rows(std::span<const std::int32_t>, std::size_t, std::span<std::int64_t>,
                              const ThreadPool&) const;
template void NgramHash::rows(std::span<const std::int64_t>, std::size_t, std::span<std::int64_t>,
                              const ThreadPool&) const;

}  // namespace megatron_graft
