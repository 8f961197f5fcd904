// Counting against the definition, by ordered maps.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "checked.hpp"
#include "corpus_files.hpp"
#include "counted_key.hpp"
#include "ngram_count.hpp"
#include "scratch.hpp"

namespace megatron_graft::testing {
namespace {

using Ngram = std::vector<std::int32_t>;

Documents random_documents(std::mt19937_64& random, std::int32_t vocab_size) {
    Documents documents(1 + random() % 12);
    for (auto& document : documents) {
        document.resize(random() % 50);
        for (std::int32_t& id : document) {
            id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(vocab_size));
        }
    }
    return documents;
}

std::map<Ngram, std::uint64_t> definition(const std::vector<Documents>& slices, std::size_t order,
                                          std::int32_t eod, bool by_documents) {
    std::map<Ngram, std::uint64_t> counts;
    for (const Documents& slice : slices) {
        for (const auto& document : slice) {
            std::set<Ngram> seen;
            for (std::size_t begin = 0; begin + order <= document.size(); ++begin) {
                const auto first = document.begin() + static_cast<std::ptrdiff_t>(begin);
                const Ngram ngram(first, first + static_cast<std::ptrdiff_t>(order));
                if (std::find(ngram.begin(), ngram.end(), eod) == ngram.end() &&
                    (!by_documents || seen.insert(ngram).second)) {
                    ++counts[ngram];
                }
            }
        }
    }
    return counts;
}

struct Knobs {
    std::uint32_t vocab_size;
    std::uint64_t min_count;
    std::uint64_t partitions;
    std::uint64_t shares_of_partition;
    std::uint64_t pool_blocks;
    std::uint64_t table_entries;
    std::size_t block_tokens;
    bool by_documents;
};

// Counts order by order through files and gives every kept n-gram with its count.
class FileCounter {
  public:
    FileCounter(const std::vector<Documents>& slices, const Knobs& knobs) : knobs_(knobs) {
        for (std::size_t slice = 0; slice < slices.size(); ++slice) {
            pieces_.push_back(write_piece(directory_, "slice" + std::to_string(slice), slices[slice]));
        }
    }

    std::map<Ngram, std::uint64_t> next_order() {
        ++order_;
        std::vector<std::vector<Run>> runs;
        for (std::size_t slice = 0; slice < pieces_.size(); ++slice) {
            runs.push_back(count_slice(task_of(slice)).runs);
        }
        const std::uint64_t parents = order_ == 2 ? knobs_.vocab_size : keys_.size();
        std::vector<KeptFile> kept;
        std::vector<Ngram> before = std::move(ngrams_);
        std::map<Ngram, std::uint64_t> result;
        ngrams_.clear();
        keys_.clear();
        for (std::uint64_t partition = 0; partition < knobs_.partitions; ++partition) {
            const PartitionTask task = sum_task(runs, parents, partition);
            const PartitionFacts facts = sum_partition(task);
            const auto keys = read_elements<std::uint64_t>(task.keys);
            const auto counts = read_elements<std::uint64_t>(task.counts);
            CHECK_EQUAL(facts.kept, keys.size());
            CHECK_EQUAL(counts.size(), keys.size());
            kept.push_back({task.keys, keys.size()});
            for (std::size_t entry = 0; entry < keys.size(); ++entry) {
                Ngram ngram = {static_cast<std::int32_t>(keys[entry] & kCountedTokenMask)};
                const auto node = static_cast<std::size_t>(keys[entry] >> kCountedTokenBits);
                const Ngram rest = order_ == 2 ? Ngram{static_cast<std::int32_t>(node)} : before.at(node);
                ngram.insert(ngram.end(), rest.begin(), rest.end());
                CHECK(result.emplace(ngram, counts[entry]).second);
                ngrams_.push_back(ngram);
                keys_.push_back(keys[entry]);
            }
        }
        kept_parents_ = parents;
        kept_ = kept;
        return result;
    }

  private:
    [[nodiscard]] std::filesystem::path path(const std::string& what, std::size_t number,
                                             unsigned order) const {
        return directory_ / (what + std::to_string(order) + "-" + std::to_string(number));
    }
    [[nodiscard]] SliceTask task_of(std::size_t slice) const {
        SliceTask task;
        task.order = order_;
        task.pieces = {pieces_[slice]};
        task.vocab_size = knobs_.vocab_size;
        task.eod = 0;
        task.kept = kept_;
        task.kept_parents = kept_parents_;
        task.lower_nodes = order_ > 3 ? path("nodes", slice, order_ - 1) : "";
        task.nodes = path("nodes", slice, order_);
        task.runs = path("runs", slice, order_);
        task.shares = knobs_.partitions * knobs_.shares_of_partition;
        task.longest_document = knobs_.by_documents ? 50 : 0;
        task.pool_blocks = knobs_.pool_blocks;
        task.table_entries = knobs_.table_entries;
        task.block_tokens = knobs_.block_tokens;
        return task;
    }
    [[nodiscard]] PartitionTask sum_task(const std::vector<std::vector<Run>>& runs, std::uint64_t parents,
                                         std::uint64_t partition) const {
        PartitionTask task;
        task.parents = parents;
        task.shares = knobs_.partitions * knobs_.shares_of_partition;
        task.first_share = partition * knobs_.shares_of_partition;
        for (std::size_t slice = 0; slice < runs.size(); ++slice) {
            for (const Run& run : runs[slice]) {
                const auto begin = run.begins.begin() + static_cast<std::ptrdiff_t>(task.first_share);
                const auto size = static_cast<std::ptrdiff_t>(knobs_.shares_of_partition) + 1;
                task.parts.push_back({path("runs", slice, order_), 3, {begin, begin + size}});
            }
        }
        task.min_units = 3 * knobs_.min_count;
        task.units_of_count = 3;
        task.keys = path("keys", partition, order_);
        task.counts = path("counts", partition, order_);
        task.pool_blocks = knobs_.pool_blocks;
        return task;
    }

    ScratchDirectory directory_;
    Knobs knobs_;
    std::vector<CorpusPiece> pieces_;
    unsigned order_ = 1;
    std::uint64_t kept_parents_ = 0;
    std::vector<KeptFile> kept_;
    std::vector<Ngram> ngrams_;
    std::vector<std::uint64_t> keys_;
};

TEST("counting through files equals the definition, however memory and keys are cut") {
    std::mt19937_64 random(20260214);
    for (int trial = 0; trial < 60; ++trial) {
        const Knobs knobs{static_cast<std::uint32_t>(2 + random() % 5),
                          1 + random() % 3,
                          1 + random() % 4,
                          1 + random() % 9,
                          1 + random() % 3,
                          trial % 2 == 0 ? 1 + random() % 5 : 1000,
                          1 + random() % 40,
                          random() % 3 == 0};
        std::vector<Documents> slices(1 + random() % 3);
        for (Documents& slice : slices) {
            slice = random_documents(random, static_cast<std::int32_t>(knobs.vocab_size));
        }
        FileCounter counter(slices, knobs);
        for (std::size_t order = 2; order <= kMaxCountedOrder; ++order) {
            std::map<Ngram, std::uint64_t> expected = definition(slices, order, 0, knobs.by_documents);
            std::erase_if(expected, [&](const auto& entry) { return entry.second < knobs.min_count; });
            CHECK_FOR(counter.next_order() == expected,
                      "trial " + std::to_string(trial) + ", order " + std::to_string(order));
        }
    }
}

TEST("tasks that cannot be are refused") {
    SliceTask slice;
    slice.order = 9;
    slice.vocab_size = 10;
    slice.shares = 1;
    slice.pool_blocks = slice.table_entries = 1;
    CHECK_THROWS(std::invalid_argument, count_slice(slice), "order 9");
    slice.order = 2;
    slice.vocab_size = (1U << 20U) + 1;
    CHECK_THROWS(std::invalid_argument, count_slice(slice), "a vocabulary");
    slice.vocab_size = 10;
    slice.shares = 0;
    CHECK_THROWS(std::invalid_argument, count_slice(slice), "0 shares");
    const ScratchDirectory directory;
    PartitionTask sum{10, {{directory / "runs", 1, {0, 1}}}, 1, 1, 1, 1, directory / "k", directory / "c", 1};
    CHECK_THROWS(std::invalid_argument, sum_partition(sum), "1 shares");
    sum.shares = 2;
    sum.parts.push_back({directory / "runs", 1, {0}});
    CHECK_THROWS(FormatError, sum_partition(sum), "other shares");
    sum.parts[1].begins = {1, 0};
    CHECK_THROWS(FormatError, sum_partition(sum), "other shares");
}

}  // namespace
}  // namespace megatron_graft::testing
