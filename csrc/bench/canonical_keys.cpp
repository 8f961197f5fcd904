#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <stdexcept>

#include "ngram_counter.hpp"

namespace megatron_graft::bench {
namespace {

constexpr unsigned kOrderBits = 3;
constexpr std::uint64_t kTokenMask = (1ULL << kKeyTokenBits) - 1;

__extension__ using Wide = unsigned __int128;

// An n-gram as one number: (highest count - count, order, tokens), most significant first. Numbers in
// ascending order are n-grams in canonical order.
class Packing {
  public:
    Packing(const std::vector<CountedLevel>& levels, std::uint32_t vocab_size)
        : max_order_(static_cast<unsigned>(levels.size()) + 1),
          token_bits_(static_cast<unsigned>(std::bit_width(vocab_size - 1))) {
        for (const CountedLevel& level : levels) {
            for (const std::uint32_t count : level.counts) {
                highest_count_ = std::max(highest_count_, count);
            }
        }
        const auto count_bits = static_cast<unsigned>(std::bit_width(highest_count_));
        if (max_order_ >= 1U << kOrderBits || count_bits + kOrderBits + max_order_ * token_bits_ > 128) {
            throw std::length_error("counts and tokens do not fit 128 bits");
        }
    }

    [[nodiscard]] unsigned max_order() const { return max_order_; }

    [[nodiscard]] Wide pack(std::uint32_t count, unsigned order, const std::int32_t* oldest) const {
        Wide packed = highest_count_ - count;
        packed = packed << kOrderBits | order;
        packed <<= token_bits_ * (max_order_ - order);
        for (unsigned place = 0; place < order; ++place) {
            packed = packed << token_bits_ | static_cast<std::uint32_t>(oldest[place]);
        }
        return packed;
    }

    void unpack(Wide packed, std::size_t row, CanonicalKeys& keys) const {
        const std::uint64_t token_mask = (1ULL << token_bits_) - 1;
        const auto head = static_cast<std::uint64_t>(packed >> (token_bits_ * max_order_));
        const auto order = static_cast<unsigned>(head & ((1U << kOrderBits) - 1));
        std::int32_t* const ids = &keys.ids[row * max_order_];
        for (unsigned age = 0; age < max_order_; ++age) {
            const auto token = static_cast<std::int32_t>(static_cast<std::uint64_t>(packed) & token_mask);
            ids[max_order_ - 1 - age] = age < order ? token : -1;
            packed >>= token_bits_;
        }
        keys.orders[row] = static_cast<std::uint8_t>(order);
        keys.counts[row] = highest_count_ - static_cast<std::uint32_t>(head >> kOrderBits);
    }

  private:
    unsigned max_order_;
    unsigned token_bits_;
    std::uint32_t highest_count_ = 0;
};

// The tokens of a node, oldest first: every level's key holds the oldest token and the node below.
void write_tokens(const std::vector<CountedLevel>& levels, unsigned order, std::uint64_t node,
                  std::int32_t* oldest) {
    for (unsigned level = order; level >= 2; --level) {
        const std::uint64_t key = levels[level - 2].keys[node];
        *oldest++ = static_cast<std::int32_t>(key & kTokenMask);
        node = key >> kKeyTokenBits;
    }
    *oldest = static_cast<std::int32_t>(node);
}

std::vector<Wide> packed_keys(const std::vector<CountedLevel>& levels, const Packing& packing,
                              const ThreadPool& pool) {
    std::size_t total = 0;
    for (const CountedLevel& level : levels) {
        total += level.keys.size();
    }
    std::vector<Wide> packed(total);
    std::size_t start = 0;
    for (unsigned order = 2; order <= packing.max_order(); ++order) {
        const CountedLevel& level = levels[order - 2];
        pool.for_ranges(level.keys.size(), 1U << 16U, [&](std::size_t begin, std::size_t end) {
            std::array<std::int32_t, 1U << kOrderBits> tokens{};
            for (std::size_t node = begin; node < end; ++node) {
                write_tokens(levels, order, node, tokens.data());
                packed[start + node] = packing.pack(level.counts[node], order, tokens.data());
            }
        });
        start += level.keys.size();
    }
    return packed;
}

void sort_in_halves(std::vector<Wide>& packed, const ThreadPool& pool) {
    const auto middle = packed.begin() + static_cast<std::ptrdiff_t>(packed.size() / 2);
    std::nth_element(packed.begin(), middle, packed.end());
    pool.for_ranges(2, 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t half = begin; half < end; ++half) {
            std::sort(half == 0 ? packed.begin() : middle, half == 0 ? middle : packed.end());
        }
    });
}

}  // namespace

CanonicalKeys canonical_keys(const std::vector<CountedLevel>& levels, std::uint32_t vocab_size,
                             const ThreadPool& pool) {
    const Packing packing(levels, vocab_size);
    std::vector<Wide> packed = packed_keys(levels, packing, pool);
    sort_in_halves(packed, pool);
    CanonicalKeys keys;
    keys.ids.resize(packed.size() * packing.max_order());
    keys.orders.resize(packed.size());
    keys.counts.resize(packed.size());
    pool.for_ranges(packed.size(), 1U << 16U, [&](std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; ++row) {
            packing.unpack(packed[row], row, keys);
        }
    });
    return keys;
}

}  // namespace megatron_graft::bench
