#include "general_tables.hpp"

#include <cstddef>

#include "measure.hpp"
#include "node_table.hpp"

// BENCH_WITH_ABSEIL is set by the Makefile, which knows how to link it; the other two are headers only.
#if defined(BENCH_WITH_ABSEIL)
#include <absl/container/flat_hash_map.h>
#endif
#if __has_include(<boost/unordered/unordered_flat_map.hpp>)
#include <boost/unordered/unordered_flat_map.hpp>
#define BENCH_WITH_BOOST
#endif
#if __has_include(<tsl/robin_map.h>)
#include <tsl/robin_map.h>
#define BENCH_WITH_ROBIN
#endif

namespace megatron_graft::bench {
namespace {

class PlainTable final : public GeneralTable {
  public:
    explicit PlainTable(std::span<const std::uint64_t> steps) : table_(steps.size()) {
        for (std::size_t row = 0; row < steps.size(); ++row) {
            table_.insert(steps[row], static_cast<std::uint32_t>(row));
        }
    }
    void lookup(const Workload& workload, Answers& answers) const override {
        static_assert(NodeTable::kNone == kNoRow);
        walk_trie(workload, [&](std::uint64_t step) { return table_.find(step); }, answers);
    }
    [[nodiscard]] double bytes() const override { return static_cast<double>(table_.bytes()); }

  private:
    NodeTable table_;
};

// boost's and tsl's tables take any hash; a weak one would be unfair to them.
struct ScatterHash {
    using is_avalanching = void;
    std::size_t operator()(std::uint64_t value) const { return scatter(value); }
};

template <typename Map>
class LibraryTable final : public GeneralTable {
  public:
    LibraryTable(std::span<const std::uint64_t> steps, double slot_bytes) : slot_bytes_(slot_bytes) {
        map_.reserve(steps.size());
        for (std::size_t row = 0; row < steps.size(); ++row) {
            map_.emplace(steps[row], static_cast<std::uint32_t>(row));
        }
    }
    void lookup(const Workload& workload, Answers& answers) const override {
        const auto find = [&](std::uint64_t step) {
            const auto found = map_.find(step);
            return found == map_.end() ? kNoRow : found->second;
        };
        walk_trie(workload, find, answers);
    }
    [[nodiscard]] double bytes() const override {
        return slot_bytes_ * static_cast<double>(map_.bucket_count());
    }

  private:
    Map map_;
    double slot_bytes_;
};

template <typename Map>
GeneralTableKind library_table(std::string name, double slot_bytes) {
    return {std::move(name), [slot_bytes](std::span<const std::uint64_t> steps) {
                return std::make_unique<LibraryTable<Map>>(steps, slot_bytes);
            }};
}

}  // namespace

std::vector<GeneralTableKind> general_tables() {
    std::vector<GeneralTableKind> kinds;
    kinds.push_back({"plain table of this bench", [](std::span<const std::uint64_t> steps) {
                         return std::make_unique<PlainTable>(steps);
                     }});
#if defined(BENCH_WITH_ABSEIL)
    kinds.push_back(
        library_table<absl::flat_hash_map<std::uint64_t, std::uint32_t>>("absl::flat_hash_map", 17));
#endif
#if defined(BENCH_WITH_BOOST)
    kinds.push_back(library_table<boost::unordered_flat_map<std::uint64_t, std::uint32_t, ScatterHash>>(
        "boost::unordered_flat_map", 17));
#endif
#if defined(BENCH_WITH_ROBIN)
    kinds.push_back(
        library_table<tsl::robin_map<std::uint64_t, std::uint32_t, ScatterHash>>("tsl::robin_map", 24));
#endif
    return kinds;
}

}  // namespace megatron_graft::bench
