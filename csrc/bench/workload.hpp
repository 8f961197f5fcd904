// What is looked up, what the right answers are, and how many probes a walk needs for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "../index_builder.hpp"

namespace megatron_graft::bench {

// One sequence of tokens. reach[p] tokens up to p, p's own included, lie in p's document; 0 at an EOD, and at
// most the longest order.
struct Workload {
    std::string name;
    std::vector<std::int32_t> tokens;
    std::vector<std::uint8_t> reach;
};

[[nodiscard]] Workload make_workload(std::string name, std::vector<std::int32_t> tokens, std::int32_t eod,
                                     std::size_t max_order);

// Keys drawn uniformly, one after the other without a gap: every position ends long matches, in rows that no
// cache holds.
[[nodiscard]] std::vector<std::int32_t> adversarial_tokens(const KeyTable& keys, std::size_t count,
                                                           std::uint64_t seed);

// By position: row, or kNoRow at a miss, and order.
struct Answers {
    std::vector<std::uint32_t> rows;
    std::vector<std::uint8_t> orders;
    explicit Answers(std::size_t positions) : rows(positions), orders(positions) {}
};

// The keys as a trie read backwards: what a general hash table would store. A node is a token, or a key's row
// plus kFirstRowNode.
class Trie {
  public:
    static constexpr unsigned kTokenBits = 20;
    static constexpr std::uint64_t kFirstRowNode = 1ULL << kTokenBits;

    // Throws std::invalid_argument if a suffix (of two tokens or more) of a key is no key: such banks need
    // phantom nodes, which no general table here has. Needs about 30 bytes an entry while it works.
    explicit Trie(const KeyTable& keys);

    [[nodiscard]] static std::uint64_t step(std::uint64_t node, std::int32_t older_token) {
        return node << kTokenBits | static_cast<std::uint32_t>(older_token);
    }
    // By row: the step that leads to it.
    [[nodiscard]] std::span<const std::uint64_t> steps() const { return steps_; }

    // Steps that a walk takes, if it knows which nodes have children: answers.orders must be right.
    [[nodiscard]] std::uint64_t count_probes(const Workload& workload, const Answers& answers) const;

  private:
    std::vector<std::uint64_t> steps_;
    std::vector<bool> has_child_;
};

// Walks every position from its newest token on. `find(step)` gives a row, or kNoRow.
template <typename Find>
void walk_trie(const Workload& workload, const Find& find, Answers& answers) {
    for (std::size_t at = 0; at < workload.tokens.size(); ++at) {
        auto node = static_cast<std::uint64_t>(workload.tokens[at]);
        std::uint32_t longest = kNoRow;
        std::uint8_t longest_order = 0;
        for (std::uint8_t order = 2; order <= workload.reach[at]; ++order) {
            const std::uint32_t row = find(Trie::step(node, workload.tokens[at + 1 - order]));
            if (row == kNoRow) {
                break;
            }
            longest = row;
            longest_order = order;
            node = Trie::kFirstRowNode + row;
        }
        answers.rows[at] = longest;
        answers.orders[at] = longest_order;
    }
}

}  // namespace megatron_graft::bench
