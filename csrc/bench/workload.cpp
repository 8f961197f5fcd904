#include "workload.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "measure.hpp"
#include "node_table.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::size_t kGroup = 32;

// The steps of all keys longer than `order` tokens lead on: their nodes become those of their `order` newest.
void descend(const KeyTable& keys, std::size_t order, const NodeTable& table,
             std::vector<std::uint32_t>& nodes) {
    NodeTable::Group<kGroup> group;
    std::vector<std::size_t> asked;
    const auto answer = [&] {
        for (std::size_t index = 0; index < asked.size(); ++index) {
            nodes[asked[index]] = group.answer(table, index);
            if (nodes[asked[index]] == NodeTable::kNone) {
                throw std::invalid_argument("row " + std::to_string(asked[index]) +
                                            " has a suffix that is no key");
            }
        }
        asked.clear();
        group.clear();
    };
    for (std::size_t row = 0; row < keys.rows(); ++row) {
        if (keys.orders[row] > order) {
            const std::uint64_t node = order == 2 ? nodes[row] : Trie::kFirstRowNode + nodes[row];
            group.ask(table, Trie::step(node, keys.token(row, order - 1)));
            asked.push_back(row);
            if (asked.size() == kGroup) {
                answer();
            }
        }
    }
    answer();
}

}  // namespace

Workload make_workload(std::string name, std::vector<std::int32_t> tokens, std::int32_t eod,
                       std::size_t max_order) {
    Workload workload{std::move(name), std::move(tokens), {}};
    workload.reach.reserve(workload.tokens.size());
    std::size_t reach = 0;
    for (const std::int32_t token : workload.tokens) {
        reach = token == eod ? 0 : std::min(reach + 1, max_order);
        workload.reach.push_back(static_cast<std::uint8_t>(reach));
    }
    return workload;
}

std::vector<std::int32_t> adversarial_tokens(const KeyTable& keys, std::size_t count, std::uint64_t seed) {
    std::vector<std::int32_t> tokens;
    tokens.reserve(count + keys.max_order);
    for (std::uint64_t draw = scatter(seed); tokens.size() < count; ++draw) {
        const std::size_t row = scale_to(scatter(draw), keys.rows());
        for (std::size_t age = keys.orders[row]; age-- > 0;) {
            tokens.push_back(keys.token(row, age));
        }
    }
    tokens.resize(count);
    return tokens;
}

Trie::Trie(const KeyTable& keys) : steps_(keys.rows()), has_child_(keys.rows()) {
    NodeTable table(keys.rows());
    std::vector<std::uint32_t> nodes(keys.rows());
    for (std::size_t row = 0; row < keys.rows(); ++row) {
        nodes[row] = static_cast<std::uint32_t>(keys.token(row, 0));
    }
    for (std::size_t order = 2; order <= keys.max_order; ++order) {
        for (std::size_t row = 0; row < keys.rows(); ++row) {
            if (keys.orders[row] == order) {
                const std::uint64_t node = order == 2 ? nodes[row] : kFirstRowNode + nodes[row];
                steps_[row] = step(node, keys.token(row, order - 1));
                table.insert(steps_[row], static_cast<std::uint32_t>(row));
                if (order > 2) {
                    has_child_[nodes[row]] = true;
                }
            }
        }
        descend(keys, order, table, nodes);
    }
}

std::uint64_t Trie::count_probes(const Workload& workload, const Answers& answers) const {
    std::uint64_t probes = 0;
    for (std::size_t at = 0; at < workload.tokens.size(); ++at) {
        const unsigned reach = workload.reach[at];
        const unsigned order = std::max<unsigned>(answers.orders[at], 1);
        const bool goes_on = order < reach && (order == 1 || has_child_[answers.rows[at]]);
        probes += order - 1 + (goes_on ? 1U : 0U);
    }
    return probes;
}

}  // namespace megatron_graft::bench
