// The hash tables that people would reach for, each holding the steps of the trie as exact 64-bit keys.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "workload.hpp"

namespace megatron_graft::bench {

class GeneralTable {
  public:
    virtual ~GeneralTable() = default;
    // One position after the other: such a table answers one question at a time.
    virtual void lookup(const Workload& workload, Answers& answers) const = 0;
    // As far as the table tells; without the allocator's share.
    [[nodiscard]] virtual double bytes() const = 0;
};

struct GeneralTableKind {
    std::string name;
    std::function<std::unique_ptr<GeneralTable>(std::span<const std::uint64_t> steps)> build;
};

// Our own plain table, and those of the libraries whose headers were there when this was compiled.
[[nodiscard]] std::vector<GeneralTableKind> general_tables();

}  // namespace megatron_graft::bench
