// The module megatron_graft._native: with the other files named bindings, all that knows Python.
//
// Arrays are taken as they are: no argument is ever converted or copied to fit (noconvert, no forcecast), and
// shape and writability are checked before a pointer leaves this file. The GIL is released around
// whatever takes long. std::invalid_argument, std::length_error and FormatError become ValueError,
// std::out_of_range IndexError, ThreadsNotStarted ConfigError, any other std::system_error OSError.

#include "bindings.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "body.hpp"
#include "checked.hpp"
#include "gather.hpp"
#include "index_builder.hpp"
#include "mapped_file.hpp"
#include "suffix_index.hpp"
#include "thread_pool.hpp"
#include "unique_rows.hpp"

namespace py = pybind11;

namespace {

using megatron_graft::Array;
using megatron_graft::Body;
using megatron_graft::body_named;
using megatron_graft::ByteRange;
using megatron_graft::IndexHeader;
using megatron_graft::MappedFile;
using megatron_graft::Matches;
using megatron_graft::Pages;
using megatron_graft::require;
using megatron_graft::require_aligned;
using megatron_graft::require_same_shape;
using megatron_graft::RowGatherer;
using megatron_graft::RowLayer;
using megatron_graft::SuffixIndex;
using megatron_graft::SuffixState;
using megatron_graft::ThreadPool;
using megatron_graft::view;
using megatron_graft::writable_view;

// Raised whenever a signature below changes; megatron_graft/bank/extension.py expects this very number.
constexpr int kInterfaceVersion = 4;

Pages pages_named(const std::string& name) {
    require(name == "file" || name == "huge", "there are no pages " + name + ", expected file or huge");
    return name == "huge" ? Pages::kHuge : Pages::kFile;
}

std::array<std::uint8_t, 32> digest_of(const py::bytes& value, const std::string& name) {
    const std::string_view bytes = value;
    std::array<std::uint8_t, 32> digest;
    require(bytes.size() == digest.size(), name + " is not 32 bytes");
    std::copy(bytes.begin(), bytes.end(), digest.begin());
    return digest;
}

py::bytes bytes_of(const std::array<std::uint8_t, 32>& digest) {
    return py::bytes(std::string(digest.begin(), digest.end()));
}

py::dict describe(const IndexHeader& header) {
    py::list levels;
    for (const auto& level : header.levels) {
        levels.append(py::dict(py::arg("order") = level.order, py::arg("entries") = level.entries,
                               py::arg("buckets") = level.buckets, py::arg("offset") = level.offset));
    }
    return py::dict(py::arg("version") = megatron_graft::kIndexVersion,
                    py::arg("min_order") = header.min_order, py::arg("max_order") = header.max_order,
                    py::arg("rows") = header.rows, py::arg("phantoms") = header.phantoms,
                    py::arg("vocab_size") = header.vocab_size, py::arg("file_bytes") = header.file_bytes,
                    py::arg("unigrams") = header.unigrams, py::arg("levels") = levels,
                    py::arg("tokenizer_sha256") = bytes_of(header.identity.tokenizer_sha256),
                    py::arg("keys_sha256") = bytes_of(header.identity.keys_sha256));
}

py::dict read_index_header(const std::string& path) {
    const MappedFile file(path);
    return describe(megatron_graft::parse_index_header(file.bytes()));
}

py::dict build_index(const std::string& path, const Array<std::int32_t>& key_ids,
                     const Array<std::uint8_t>& key_orders, std::uint64_t vocab_size,
                     const py::bytes& tokenizer_sha256, const py::bytes& keys_sha256, unsigned threads,
                     std::uint64_t memory_bytes, const std::optional<py::function>& progress) {
    require(key_ids.ndim() == 2 && key_orders.ndim() == 1, "key_ids is [N, max_order] and key_orders is [N]");
    require(key_ids.shape(0) == key_orders.shape(0), "key_ids and key_orders differ in rows");
    const megatron_graft::KeyTable keys{view(key_ids), view(key_orders),
                                        static_cast<std::size_t>(key_ids.shape(1))};
    const megatron_graft::IndexIdentity identity{digest_of(tokenizer_sha256, "tokenizer_sha256"),
                                                 digest_of(keys_sha256, "keys_sha256")};
    megatron_graft::BuildOptions options{threads, memory_bytes, {}};
    if (progress) {
        options.progress = [&progress](std::uint64_t done, std::uint64_t total) {
            const py::gil_scoped_acquire acquired;
            (*progress)(done, total);
        };
    }
    IndexHeader header;
    {
        const py::gil_scoped_release released;
        header = megatron_graft::build_index(path, keys, vocab_size, identity, options);
    }
    return describe(header);
}

// A SuffixIndex and the file that it is a view of.
class MappedIndex {
  public:
    MappedIndex(const std::string& path, std::uint64_t row_limit, const std::string& pages,
                const std::string& body, unsigned threads)
        : file_(open_file(path, pages_named(pages))),
          index_(file_.bytes(), row_limit, body_named(body)),
          threads_(threads) {
        megatron_graft::shared_pool(threads);  // a bad number of threads is an error here
    }

    template <typename Token>
    void lookup(const Array<Token>& tokens, std::optional<std::int64_t> eod,
                const std::optional<Array<bool>>& document_starts, Array<std::int64_t> rows_out,
                Array<std::uint8_t> orders_out) const {
        require(tokens.ndim() == 2, "tokens is [B, S]");
        require_same_shape(tokens, rows_out, "rows_out does not have the shape of tokens");
        require_same_shape(tokens, orders_out, "orders_out does not have the shape of tokens");
        std::span<const std::uint8_t> starts;
        if (document_starts) {
            require_same_shape(tokens, *document_starts, "document_starts does not have the shape of tokens");
            // A NumPy bool is one byte; read as a byte, any value in it is defined.
            starts = {static_cast<const std::uint8_t*>(static_cast<const void*>(document_starts->data())),
                      static_cast<std::size_t>(document_starts->size())};
        }
        const megatron_graft::TokenBatch<Token> batch{view(tokens), static_cast<std::size_t>(tokens.shape(1)),
                                                      starts, eod};
        const Matches matches{writable_view(rows_out, "rows_out"), writable_view(orders_out, "orders_out")};
        const ThreadPool& pool = megatron_graft::shared_pool(threads_);  // after a fork, another one
        const py::gil_scoped_release released;
        index_.lookup(batch, matches, pool);
    }

    template <typename Token>
    void step(SuffixState& state, const Array<Token>& tokens, std::optional<std::int64_t> eod,
              Array<std::int64_t> rows_out, Array<std::uint8_t> orders_out) const {
        require(tokens.ndim() == 1, "tokens is [B]");
        require_same_shape(tokens, rows_out, "rows_out does not have the shape of tokens");
        require_same_shape(tokens, orders_out, "orders_out does not have the shape of tokens");
        // The interpreter's lock is kept: it is what protects the state.
        index_.step(state, view(tokens), eod,
                    {writable_view(rows_out, "rows_out"), writable_view(orders_out, "orders_out")});
    }

    [[nodiscard]] SuffixState start(std::size_t sequences) const {
        return SuffixState(sequences, index_.header().max_order);
    }

    [[nodiscard]] std::pair<std::vector<std::uint64_t>, std::uint64_t> count_contents() const {
        const py::gil_scoped_release released;
        SuffixIndex::Contents contents = index_.count_contents();
        return {std::move(contents.entries), contents.rows};
    }

    [[nodiscard]] py::dict header() const { return describe(index_.header()); }

  private:
    // Copying a large index takes a while.
    static MappedFile open_file(const std::string& path, Pages pages) {
        const py::gil_scoped_release released;
        return MappedFile(path, pages);
    }

    MappedFile file_;
    SuffixIndex index_;
    unsigned threads_;
};

// A RowGatherer and the arrays that hold its rows.
class ArrayRowGatherer {
  public:
    using LayerShards = std::vector<std::vector<Array<std::uint8_t>>>;
    using LayerScales = std::vector<std::vector<Array<float>>>;

    ArrayRowGatherer(LayerShards shards, LayerScales scales, unsigned threads)
        : shards_(std::move(shards)),
          scales_(std::move(scales)),
          threads_(threads),
          gatherer_(layers_of(shards_, scales_)) {
        megatron_graft::shared_pool(threads);  // a bad number of threads is an error here
    }

    void gather(const Array<std::int64_t>& rows, Array<std::uint8_t> out,
                const std::optional<std::vector<std::pair<std::size_t, std::size_t>>>& ranges,
                const std::string& body) const {
        require(rows.ndim() == 1 && out.ndim() == 2, "rows is [M] and out is [M, row_bytes]");
        std::vector<ByteRange> wanted = gatherer_.all_columns();
        if (ranges) {
            wanted.clear();
            for (const auto& [begin, end] : *ranges) {
                wanted.push_back({begin, end});
            }
        }
        require(out.shape(0) == rows.shape(0) &&
                    static_cast<std::size_t>(out.shape(1)) == gatherer_.bytes_of_row(wanted),
                "out is not [M, " + std::to_string(gatherer_.bytes_of_row(wanted)) + "]");
        const auto numbers = view(rows);
        const auto target = std::as_writable_bytes(writable_view(out, "out"));
        const Body chosen = body_named(body);
        const ThreadPool& pool = megatron_graft::shared_pool(threads_);  // after a fork, another one
        const py::gil_scoped_release released;
        gatherer_.gather(numbers, target, wanted, &pool, chosen);
    }

  private:
    static std::vector<RowLayer> layers_of(const LayerShards& shards, const LayerScales& scales) {
        require(scales.empty() || scales.size() == shards.size(), "scales has not one list for each layer");
        std::vector<RowLayer> layers;
        for (std::size_t layer = 0; layer < shards.size(); ++layer) {
            layers.emplace_back();
            for (const auto& shard : shards[layer]) {
                require(shard.ndim() == 2, "a shard is [rows, row_bytes]");
                layers.back().push_back({bytes_of(shard), static_cast<std::size_t>(shard.shape(0)),
                                         static_cast<std::size_t>(shard.shape(1))});
            }
            if (!scales.empty() && !scales[layer].empty()) {
                add_scales(layers.back(), scales[layer]);
            }
        }
        return layers;
    }

    static void add_scales(RowLayer& layer, const std::vector<Array<float>>& scales) {
        require(scales.size() == layer.size(), "scales has not one array for each shard");
        for (std::size_t shard = 0; shard < layer.size(); ++shard) {
            require(scales[shard].ndim() == 1 &&
                        static_cast<std::size_t>(scales[shard].size()) == layer[shard].rows,
                    "a shard's scales are not [rows]");
            layer[shard].scales = bytes_of(scales[shard]);
        }
    }

    static const std::byte* bytes_of(const py::array& array) {
        return static_cast<const std::byte*>(array.data());
    }

    LayerShards shards_;
    LayerScales scales_;
    unsigned threads_;
    RowGatherer gatherer_;
};

std::size_t unique_rows(const Array<std::int64_t>& rows, Array<std::int64_t> unique_out,
                        Array<std::int32_t> inverse_out) {
    require(rows.ndim() == 1 && unique_out.ndim() == 1 && inverse_out.ndim() == 1,
            "rows, unique_out and inverse_out have one dimension");
    const auto numbers = view(rows);
    const auto unique = writable_view(unique_out, "unique_out");
    const auto inverse = writable_view(inverse_out, "inverse_out");
    const py::gil_scoped_release released;
    return megatron_graft::unique_rows(numbers, unique, inverse);
}

template <typename Token>
void define_lookup(py::class_<MappedIndex>& index) {
    index.def("lookup", &MappedIndex::lookup<Token>, py::arg("tokens").noconvert(), py::arg("eod"),
              py::arg("document_starts").noconvert(), py::arg("rows_out").noconvert(),
              py::arg("orders_out").noconvert(),
              "Write row (int64, -1 at a miss) and order (uint8, 0 at a miss) for every token of [B, S].");
    index.def("step", &MappedIndex::step<Token>, py::arg("state"), py::arg("tokens").noconvert(),
              py::arg("eod"), py::arg("rows_out").noconvert(), py::arg("orders_out").noconvert(),
              "Append one token to every sequence of the state and write its row and order, all [B].");
}

void define_index(py::module_& module) {
    module.def(
        "build_index", &build_index, py::arg("path"), py::arg("key_ids").noconvert(),
        py::arg("key_orders").noconvert(), py::arg("vocab_size"), py::arg("tokenizer_sha256"),
        py::arg("keys_sha256"), py::arg("threads"), py::arg("memory_bytes"), py::arg("progress") = py::none(),
        "Write the index of int32 [N, max_order] right-aligned ids and uint8 [N] orders to a new file; "
        "return its header.");
    module.def("read_index_header", &read_index_header, py::arg("path"),
               "Check an index's header and return it.");
    py::class_<SuffixState>(module, "SuffixState", "What generation remembers of B sequences between tokens.")
        .def_property_readonly("sequences", &SuffixState::sequences)
        .def(
            "reorder",
            [](SuffixState& state, const Array<std::int64_t>& parents) {
                require(parents.ndim() == 1, "parents is [B]");
                state.reorder(view(parents));
            },
            py::arg("parents").noconvert(), "Sequence i becomes what sequence parents[i] was.")
        .def(
            "restart",
            [](SuffixState& state, std::int64_t sequence) {
                if (sequence < 0 || static_cast<std::size_t>(sequence) >= state.sequences()) {
                    throw std::out_of_range("sequence " + std::to_string(sequence) + " of " +
                                            std::to_string(state.sequences()));
                }
                state.restart(static_cast<std::size_t>(sequence));
            },
            py::arg("sequence"), "The next token starts a document.");
    py::class_<MappedIndex> index(module, "SuffixIndex",
                                  "Exact longest-suffix lookup; immutable, thread-safe.");
    index.def(py::init<const std::string&, std::uint64_t, const std::string&, const std::string&, unsigned>(),
              py::arg("path"), py::arg("row_limit"), py::arg("pages"), py::arg("body"), py::arg("threads"),
              "Open an index file. Only rows below row_limit are answers; pages is \"file\" or \"huge\".");
    define_lookup<std::int32_t>(index);
    define_lookup<std::int64_t>(index);
    index.def("start", &MappedIndex::start, py::arg("sequences"),
              "The state of so many sequences without a token.");
    index.def("count_contents", &MappedIndex::count_contents,
              "How many entries each section has and how many of all are rows, by counting.");
    index.def_property_readonly("header", &MappedIndex::header);
}

// Pools are made wherever threads are first wanted, so it is here and not in every caller that this becomes
// the package's own error.
void set_config_error(const megatron_graft::ThreadsNotStarted& error) {
    const py::object kind = py::module_::import("megatron_graft.errors").attr("ConfigError");
    py::set_error(
        kind, kind("threads", "cannot be started: " + error.code().message(), py::arg("got") = error.threads,
                   py::arg("remedy") = "Ask for fewer threads, or raise the limit on processes "
                                       "(ulimit -u, pids.max of the cgroup) or on memory."));
}

void define_errors() {
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) {
                std::rethrow_exception(pointer);
            }
        } catch (const megatron_graft::FormatError& error) {
            py::set_error(PyExc_ValueError, error.what());
        } catch (const megatron_graft::ThreadsNotStarted& error) {
            set_config_error(error);
        } catch (const std::system_error& error) {
            py::set_error(PyExc_OSError, py::make_tuple(error.code().value(), error.what()));
        }
    });
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Longest-suffix lookup, row gather, hashed n-grams and counting in C++.";
    module.attr("INTERFACE_VERSION") = kInterfaceVersion;
    define_errors();
    define_index(module);
    megatron_graft::define_hashing(module);
    megatron_graft::define_counting(module);

    py::class_<ArrayRowGatherer>(module, "RowGatherer",
                                 "The rows of a bank, ready to be copied; thread-safe.")
        .def(py::init<ArrayRowGatherer::LayerShards, ArrayRowGatherer::LayerScales, unsigned>(),
             py::arg("layers").noconvert(), py::arg("scales").noconvert(), py::arg("threads"),
             "Per donor layer its shards, uint8 [n_i, bytes], and, unless there are none, their scales, "
             "float32 "
             "[n_i].")
        .def("gather", &ArrayRowGatherer::gather, py::arg("rows").noconvert(), py::arg("out").noconvert(),
             py::arg("ranges") = py::none(), py::arg("body") = "auto",
             "Copy rows (int64 [M], negative gives zeros) into out (uint8 [M, row_bytes]); ranges are per "
             "layer "
             "the bytes wanted of its row, (begin, end).");
    module.def(
        "unique_rows", &unique_rows, py::arg("rows").noconvert(), py::arg("unique_out").noconvert(),
        py::arg("inverse_out").noconvert(),
        "Write the distinct non-negative rows (ascending) and, per row, 1 + its place among them or 0; "
        "return how many.");
}
