#include "ngram_counter.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <limits>
#include <stdexcept>

#include "measure.hpp"
#include "node_table.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::size_t kPartitionBits = 10;
constexpr std::size_t kPartitions = std::size_t{1} << kPartitionBits;
constexpr std::size_t kKeysAtOnce = std::size_t{1} << 28U;  // bounds memory: 8 bytes each
constexpr std::uint32_t kNoNode = std::numeric_limits<std::uint32_t>::max();

std::size_t partition_of(std::uint64_t key) {
    return scatter(key) >> (64U - kPartitionBits);
}

// The part of [0, count) that belongs to one of `parts` workers.
struct Range {
    std::size_t begin;
    std::size_t end;
    Range(std::size_t count, std::size_t parts, std::size_t part)
        : begin(count * part / parts), end(count * (part + 1) / parts) {}
};

void for_parts(const ThreadPool& pool, const std::function<void(std::size_t part)>& body) {
    pool.for_ranges(pool.threads(), 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t part = begin; part < end; ++part) {
            body(part);
        }
    });
}

// Counts the keys of one partition in a table that fits the cache.
class PartitionCounter {
  public:
    void count(std::span<const std::uint64_t> keys, std::uint32_t min_count, CountedLevel& frequent) {
        const std::size_t capacity = std::bit_ceil(keys.size() + keys.size() / 4 + 64);
        keys_.resize(std::max(keys_.size(), capacity));
        counts_.assign(capacity, 0);
        const std::size_t mask = capacity - 1;
        for (const std::uint64_t key : keys) {
            std::size_t slot = scatter(key) & mask;
            while (counts_[slot] != 0 && keys_[slot] != key) {
                slot = (slot + 1) & mask;
            }
            keys_[slot] = key;
            ++counts_[slot];
        }
        for (std::size_t slot = 0; slot < capacity; ++slot) {
            if (counts_[slot] >= min_count) {
                frequent.keys.push_back(keys_[slot]);
                frequent.counts.push_back(counts_[slot]);
            }
        }
    }

  private:
    std::vector<std::uint64_t> keys_;
    std::vector<std::uint32_t> counts_;
};

// One level's work. `nodes[i]` is the node of the (n-1)-gram that ends at position i, or kNoNode.
class LevelCounter {
  public:
    LevelCounter(std::span<const std::int32_t> tokens, std::vector<std::uint32_t>& nodes, unsigned order,
                 const ThreadPool& pool)
        : tokens_(tokens), nodes_(nodes), reach_(order - 1), pool_(pool) {}

    CountedLevel count(std::uint32_t min_count) {
        const std::size_t passes = tokens_.size() / kKeysAtOnce + 1;
        CountedLevel level;
        for (std::size_t pass = 0; pass < passes; ++pass) {
            count_partitions(Range(kPartitions, passes, pass), min_count, level);
        }
        if (level.keys.size() >= kNoNode) {
            throw std::length_error("a level of 2^32 n-grams or more");
        }
        return level;
    }

    // Moves every position from its (n-1)-gram to the n-gram that ends there, oldest positions last.
    void advance(const CountedLevel& level) {
        NodeTable table(level.keys.size());
        for (std::size_t node = 0; node < level.keys.size(); ++node) {
            table.insert(level.keys[node], static_cast<std::uint32_t>(node));
        }
        const std::size_t parts = pool_.threads();
        std::vector<std::uint32_t> before(
            parts);  // a range's first position needs what another range replaces
        for (std::size_t part = 0; part < parts; ++part) {
            const std::size_t begin = Range(nodes_.size(), parts, part).begin;
            before[part] = begin == 0 ? kNoNode : nodes_[begin - 1];
        }
        for_parts(pool_, [&](std::size_t part) {
            advance_range(table, Range(nodes_.size(), parts, part), before[part]);
        });
    }

  private:
    static bool both_frequent(std::uint32_t node, std::uint32_t node_before) {
        return node != kNoNode && node_before != kNoNode;
    }
    bool is_candidate(std::size_t at) const {
        return at >= reach_ && both_frequent(nodes_[at], nodes_[at - 1]);
    }
    std::uint64_t key_at(std::size_t at) const {
        return std::uint64_t{nodes_[at]} << kKeyTokenBits | static_cast<std::uint32_t>(tokens_[at - reach_]);
    }

    template <typename Body>
    void for_candidates(const Range& range, const Range& partitions, Body body) const {
        for (std::size_t at = range.begin; at < range.end; ++at) {
            if (is_candidate(at)) {
                const std::uint64_t key = key_at(at);
                const std::size_t partition = partition_of(key);
                if (partition >= partitions.begin && partition < partitions.end) {
                    body(partition - partitions.begin, key);
                }
            }
        }
    }

    void count_partitions(const Range& partitions, std::uint32_t min_count, CountedLevel& level) {
        std::vector<std::size_t> ends;
        const std::vector<std::uint64_t> keys = partitioned_keys(partitions, ends);
        std::vector<CountedLevel> frequent(ends.size());
        pool_.for_ranges(ends.size(), 1, [&](std::size_t begin, std::size_t end) {
            PartitionCounter counter;
            for (std::size_t part = begin; part < end; ++part) {
                const std::size_t start = part == 0 ? 0 : ends[part - 1];
                counter.count(std::span(keys).subspan(start, ends[part] - start), min_count, frequent[part]);
            }
        });
        for (CountedLevel& part : frequent) {
            level.keys.insert(level.keys.end(), part.keys.begin(), part.keys.end());
            level.counts.insert(level.counts.end(), part.counts.begin(), part.counts.end());
            part = CountedLevel{};
        }
    }

    // The keys of some partitions, one partition after the other; `ends` says where each ends.
    std::vector<std::uint64_t> partitioned_keys(const Range& partitions,
                                                std::vector<std::size_t>& ends) const {
        const std::size_t parts = pool_.threads();
        const std::size_t count = partitions.end - partitions.begin;
        std::vector<std::vector<std::size_t>> places(parts, std::vector<std::size_t>(count));
        for_parts(pool_, [&](std::size_t part) {
            std::vector<std::size_t>& sizes = places[part];
            for_candidates(Range(tokens_.size(), parts, part), partitions,
                           [&](std::size_t partition, std::uint64_t) { ++sizes[partition]; });
        });
        std::size_t total = 0;
        for (std::size_t partition = 0; partition < count; ++partition) {
            for (std::vector<std::size_t>& starts : places) {
                total += starts[partition];
                starts[partition] = total - starts[partition];
            }
            ends.push_back(total);
        }
        std::vector<std::uint64_t> keys(total);
        for_parts(pool_, [&](std::size_t part) {
            std::vector<std::size_t>& next = places[part];
            for_candidates(Range(tokens_.size(), parts, part), partitions,
                           [&](std::size_t partition, std::uint64_t key) { keys[next[partition]++] = key; });
        });
        return keys;
    }

    void advance_range(const NodeTable& table, const Range& range, std::uint32_t before) {
        constexpr std::size_t kGroup = 32;
        NodeTable::Group<kGroup> group;
        std::vector<std::size_t> places;
        for (std::size_t at = range.end; at > range.begin;) {
            places.clear();
            group.clear();
            while (at > range.begin && places.size() < kGroup) {
                --at;
                const std::uint32_t node_before = at == range.begin ? before : nodes_[at - 1];
                if (at >= reach_ && both_frequent(nodes_[at], node_before)) {
                    group.ask(table, key_at(at));
                    places.push_back(at);
                } else {
                    nodes_[at] = kNoNode;
                }
            }
            for (std::size_t index = 0; index < places.size(); ++index) {
                nodes_[places[index]] = group.answer(table, index);
            }
        }
    }

    std::span<const std::int32_t> tokens_;
    std::vector<std::uint32_t>& nodes_;
    std::size_t reach_;  // how far the oldest token of an n-gram is from its newest
    const ThreadPool& pool_;
};

}  // namespace

std::vector<CountedLevel> count_levels(std::span<const std::int32_t> tokens, std::int32_t eod,
                                       const CountOptions& options, const ThreadPool& pool) {
    static_assert(kNoNode == NodeTable::kNone);
    std::vector<std::uint32_t> nodes(tokens.size());
    for (std::size_t at = 0; at < tokens.size(); ++at) {
        nodes[at] = tokens[at] == eod ? kNoNode : static_cast<std::uint32_t>(tokens[at]);
    }
    std::vector<CountedLevel> levels;
    for (unsigned order = 2; order <= options.max_order; ++order) {
        LevelCounter counter(tokens, nodes, order, pool);
        levels.push_back(counter.count(options.min_count));
        if (order < options.max_order) {
            counter.advance(levels.back());
        }
        if (options.counted) {
            options.counted(order, levels.back());
        }
    }
    return levels;
}

}  // namespace megatron_graft::bench
