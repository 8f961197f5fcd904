// Counting in Python: megatron_graft._native.count_slice and .sum_partition.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "bucket_pool.hpp"
#include "ngram_count.hpp"

namespace megatron_graft {
namespace {

using PieceFields = std::tuple<std::uint32_t, std::string, unsigned, std::uint64_t, std::uint64_t,
                               std::string, std::uint64_t, std::uint64_t>;
using FileFields = std::pair<std::string, std::uint64_t>;
using PartFields = std::tuple<std::string, std::uint64_t, Array<std::uint64_t>>;

std::vector<CorpusPiece> pieces_of(const std::vector<PieceFields>& fields) {
    std::vector<CorpusPiece> pieces;
    for (const auto& [data_set, ids, id_bytes, first, tokens, lengths, offset, documents] : fields) {
        pieces.push_back({data_set, ids, id_bytes, first, tokens, lengths, offset, documents});
    }
    return pieces;
}

std::vector<KeptFile> files_of(const std::vector<FileFields>& fields) {
    std::vector<KeptFile> files;
    for (const auto& [path, entries] : fields) {
        files.push_back({path, entries});
    }
    return files;
}

py::array_t<std::uint64_t> array_of(const std::vector<std::uint64_t>& values) {
    return py::array_t<std::uint64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict describe(const SliceFacts& facts) {
    py::list runs;
    for (const Run& run : facts.runs) {
        runs.append(py::make_tuple(run.data_set, array_of(run.begins)));
    }
    return py::dict(py::arg("tokens") = facts.tokens, py::arg("candidates") = facts.candidates,
                    py::arg("records") = facts.records, py::arg("passes") = facts.passes,
                    py::arg("node_seconds") = facts.node_seconds,
                    py::arg("merge_seconds") = facts.merge_seconds, py::arg("runs") = runs);
}

py::dict count_slice_in_python(unsigned order, const std::vector<PieceFields>& pieces,
                               std::uint32_t vocab_size, std::optional<std::uint32_t> eod,
                               const std::vector<FileFields>& kept, std::uint64_t kept_parents,
                               const std::string& lower_nodes, const std::string& nodes, bool keep_nodes,
                               const std::string& runs, std::uint64_t shares, bool split_runs,
                               std::uint64_t longest_document, std::uint64_t pool_blocks,
                               std::uint64_t table_entries, std::size_t block_tokens) {
    const SliceTask task{
        order,         pieces_of(pieces), vocab_size, eod,    files_of(kept), kept_parents,     lower_nodes,
        nodes,         keep_nodes,        runs,       shares, split_runs,     longest_document, pool_blocks,
        table_entries, block_tokens};
    SliceFacts facts;
    try {
        const py::gil_scoped_release released;
        facts = count_slice(task);
    } catch (const TokenOutOfRange& error) {
        // Which document that is, the caller knows better.
        return py::dict(py::arg("bad_token") = py::make_tuple(error.data_set, error.place, error.value));
    }
    return describe(facts);
}

py::dict sum_partition_in_python(std::uint64_t parents, const std::vector<PartFields>& parts,
                                 std::uint64_t shares, std::uint64_t first_share, std::uint64_t min_units,
                                 std::uint64_t units_of_count, const std::string& keys,
                                 const std::string& counts, std::uint64_t pool_blocks) {
    PartitionTask task{parents,        {},   shares, first_share, min_units,
                       units_of_count, keys, counts, pool_blocks};
    for (const auto& [path, units, begins] : parts) {
        require(begins.ndim() == 1 && begins.size() > 0, "begins of a run is [shares + 1]");
        const auto values = view(begins);
        task.parts.push_back({path, units, {values.begin(), values.end()}});
    }
    PartitionFacts facts;
    {
        const py::gil_scoped_release released;
        facts = sum_partition(task);
    }
    std::vector<std::uint64_t> histogram_counts;
    std::vector<std::uint64_t> histogram_numbers;
    for (const auto& [count, number] : facts.histogram) {
        histogram_counts.push_back(count);
        histogram_numbers.push_back(number);
    }
    return py::dict(
        py::arg("records") = facts.records, py::arg("distinct") = facts.distinct,
        py::arg("kept") = facts.kept,
        py::arg("histogram") = py::make_tuple(array_of(histogram_counts), array_of(histogram_numbers)));
}

}  // namespace

void define_counting(py::module_& module) {
    module.def(
        "count_slice", &count_slice_in_python, py::kw_only(), py::arg("order"), py::arg("pieces"),
        py::arg("vocab_size"), py::arg("eod"), py::arg("kept"), py::arg("kept_parents"),
        py::arg("lower_nodes"), py::arg("nodes"), py::arg("keep_nodes"), py::arg("runs"), py::arg("shares"),
        py::arg("split_runs"), py::arg("longest_document"), py::arg("pool_blocks"), py::arg("table_entries"),
        py::arg("block_tokens"),
        "Count the n-grams of one order in a slice of a corpus and write runs; return what was found, or "
        "only bad_token = (data set, number in its file, id).");
    module.def("sum_partition", &sum_partition_in_python, py::kw_only(), py::arg("parents"), py::arg("parts"),
               py::arg("shares"), py::arg("first_share"), py::arg("min_units"), py::arg("units_of_count"),
               py::arg("keys"), py::arg("counts"), py::arg("pool_blocks"),
               "Sum up one partition of all runs, write the keys and counts that are kept; return how many.");
    module.def("kept_table_bytes", &KeptTable::bytes_for, py::arg("entries"), py::arg("total"),
               py::arg("parents"), "Bytes of memory for so many kept n-grams of all of one order.");
    module.attr("POOL_BLOCK_BYTES") = BucketPool<std::uint64_t>::kBlockBytes;
}

}  // namespace megatron_graft
