#include "suffix_table.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

#include "arithmetic.hpp"

namespace megatron_graft {
namespace {

constexpr std::uint32_t kEmpty = std::numeric_limits<std::uint32_t>::max();

// Extends the hash of a suffix by the next older token; mixes as SplitMix64 does.
std::uint64_t extend_hash(std::uint64_t hash, std::uint64_t token) {
    hash = (hash ^ token) + 0x9e3779b97f4a7c15U;
    hash = (hash ^ (hash >> 30U)) * 0xbf58476d1ce4e5b9U;
    hash = (hash ^ (hash >> 27U)) * 0x94d049bb133111ebU;
    return hash ^ (hash >> 31U);
}

std::uint32_t tag_of(std::uint64_t hash) {
    return static_cast<std::uint32_t>(hash >> 32U);
}

template <typename Token>
std::uint64_t hash_suffix(const Token* newest, std::size_t order) {
    std::uint64_t hash = 0;
    for (std::size_t age = 0; age < order; ++age) {
        hash = extend_hash(hash, static_cast<std::uint64_t>(*(newest - age)));
    }
    return hash;
}

std::invalid_argument bad_key(std::size_t row, const std::string& problem) {
    return std::invalid_argument("row " + std::to_string(row) + " " + problem);
}

}  // namespace

SuffixTable::SuffixTable(std::span<const std::int32_t> key_ids, std::span<const std::uint8_t> key_orders,
                         std::int64_t vocab_size)
    : max_order_(key_orders.empty() ? 0 : key_ids.size() / key_orders.size()),
      vocab_size_(vocab_size),
      key_ids_(key_ids.begin(), key_ids.end()),
      key_orders_(key_orders.begin(), key_orders.end()) {
    if (max_order_ > kMaxOrder || max_order_ * rows() != key_ids_.size()) {
        throw std::invalid_argument("key_ids do not fit key_orders");
    }
    if (rows() >= kEmpty) {
        throw std::length_error("a table holds fewer than 2^32 - 1 keys");
    }
    slots_.assign(std::bit_ceil(checked_multiply(rows() + 1, 2)), Slot{0, kEmpty});
    slot_mask_ = slots_.size() - 1;
    for (std::size_t row = 0; row < rows(); ++row) {
        insert(row);
    }
}

void SuffixTable::insert(std::size_t row) {
    const std::size_t order = key_orders_[row];
    if (order == 0 || order > max_order_) {
        throw bad_key(row, "has order " + std::to_string(order));
    }
    const std::int32_t* newest = key_ids_.data() + (row + 1) * max_order_ - 1;
    const auto in_vocab = [this](std::int32_t id) { return id >= 0 && id < vocab_size_; };
    if (!std::all_of(newest + 1 - order, newest + 1, in_vocab)) {
        throw bad_key(row, "has a token outside the vocabulary");
    }
    const std::uint64_t hash = hash_suffix(newest, order);
    Slot& slot = slots_[find_slot(hash, newest, order)];
    if (slot.row != kEmpty) {
        throw bad_key(row, "repeats the key of row " + std::to_string(slot.row));
    }
    slot = Slot{tag_of(hash), static_cast<std::uint32_t>(row)};
    has_order_[order] = true;
}

template <typename Token>
std::size_t SuffixTable::find_slot(std::uint64_t hash, const Token* newest, std::size_t order) const {
    // Half of the slots are empty, so the walk ends.
    for (std::size_t index = hash & slot_mask_;; index = (index + 1) & slot_mask_) {
        const Slot& slot = slots_[index];
        if (slot.row == kEmpty) {
            return index;
        }
        if (slot.tag != tag_of(hash) || key_orders_[slot.row] != order) {
            continue;
        }
        const std::int32_t* key_end = key_ids_.data() + (slot.row + std::size_t{1}) * max_order_;
        if (std::equal(key_end - order, key_end, newest + 1 - order)) {
            return index;
        }
    }
}

template <typename Token>
SuffixTable::Match SuffixTable::longest_match(const Token* newest, std::size_t reach) const {
    std::array<std::uint64_t, kMaxOrder + 1> hashes;  // by order; filled up to reach, read up to reach
    hashes[0] = 0;
    for (std::size_t order = 1; order <= reach; ++order) {
        hashes[order] = extend_hash(hashes[order - 1], static_cast<std::uint64_t>(*(newest + 1 - order)));
    }
    for (std::size_t order = reach; order > 0; --order) {
        if (!has_order_[order]) {
            continue;
        }
        const Slot& slot = slots_[find_slot(hashes[order], newest, order)];
        if (slot.row != kEmpty) {
            return Match{slot.row, order};
        }
    }
    return Match{};
}

template <typename Token>
void SuffixTable::lookup(const Sequence<Token>& sequence, Matches matches) const {
    const std::size_t length = sequence.tokens.size();
    const bool has_starts = !sequence.document_starts.empty();
    if (matches.rows.size() != length || matches.orders.size() != length ||
        (has_starts && sequence.document_starts.size() != length)) {
        throw std::invalid_argument("tokens, document_starts and outputs differ in length");
    }
    std::size_t reach = 0;  // how many tokens, this one included, may belong to an n-gram that ends here
    for (std::size_t position = 0; position < length; ++position) {
        if (has_starts && sequence.document_starts[position] != 0) {
            reach = 0;
        }
        const std::int64_t token = sequence.tokens[position];
        const bool usable = token >= 0 && token < vocab_size_ && token != sequence.eod;
        reach = usable ? std::min(reach + 1, max_order_) : 0;
        const Match match = longest_match(sequence.tokens.data() + position, reach);
        matches.rows[position] = match.row;
        matches.orders[position] = static_cast<std::uint8_t>(match.order);
    }
}

template void SuffixTable::lookup(const Sequence<std::int32_t>& sequence, Matches matches) const;
template void SuffixTable::lookup(const Sequence<std::int64_t>& sequence, Matches matches) const;

}  // namespace megatron_graft
