// The module megatron_graft._native: the only file that knows Python.
//
// Arrays are taken as they are: no argument is ever converted or copied to fit (noconvert, no forcecast), and
// shape and writability are checked before a pointer leaves this file. The GIL is released around the C++
// proper. std::invalid_argument and std::length_error become ValueError, std::out_of_range IndexError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "gather.hpp"
#include "suffix_table.hpp"

namespace py = pybind11;

namespace {

using megatron_graft::ColumnBlock;
using megatron_graft::Matches;
using megatron_graft::Sequence;
using megatron_graft::SuffixTable;

// Raised whenever a signature below changes; megatron_graft/bank/extension.py expects this very number.
constexpr int kInterfaceVersion = 1;

template <typename Element>
using Array = py::array_t<Element, py::array::c_style>;

void require(bool condition, const std::string& message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

void require_same_shape(const py::array& left, const py::array& right, const std::string& message) {
    require(
        left.ndim() == right.ndim() && std::equal(left.shape(), left.shape() + left.ndim(), right.shape()),
        message);
}

template <typename Element>
std::span<const Element> view(const Array<Element>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <typename Element>
std::span<Element> writable_view(Array<Element>& array, const std::string& name) {
    require(array.writeable(), name + " is read-only");
    return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

SuffixTable make_table(const Array<std::int32_t>& key_ids, const Array<std::uint8_t>& key_orders,
                       std::int64_t vocab_size) {
    require(key_ids.ndim() == 2 && key_orders.ndim() == 1, "key_ids is [N, max_order] and key_orders is [N]");
    require(key_ids.shape(0) == key_orders.shape(0), "key_ids and key_orders differ in rows");
    const auto ids = view(key_ids);
    const auto orders = view(key_orders);
    const py::gil_scoped_release released;
    return SuffixTable(ids, orders, vocab_size);
}

template <typename Token>
void lookup(const SuffixTable& table, const Array<Token>& tokens, std::optional<std::int64_t> eod,
            const std::optional<Array<bool>>& document_starts, Array<std::int64_t> rows_out,
            Array<std::uint8_t> orders_out) {
    require(tokens.ndim() == 2, "tokens is [B, S]");
    require_same_shape(tokens, rows_out, "rows_out does not have the shape of tokens");
    require_same_shape(tokens, orders_out, "orders_out does not have the shape of tokens");
    const std::span<const Token> all_tokens = view(tokens);
    const std::span<std::int64_t> rows = writable_view(rows_out, "rows_out");
    const std::span<std::uint8_t> orders = writable_view(orders_out, "orders_out");
    std::span<const std::uint8_t> starts;
    if (document_starts) {
        require_same_shape(tokens, *document_starts, "document_starts does not have the shape of tokens");
        // A NumPy bool is one byte; read as a byte, any value in it is defined.
        starts = {static_cast<const std::uint8_t*>(static_cast<const void*>(document_starts->data())),
                  static_cast<std::size_t>(document_starts->size())};
    }
    const auto sequences = static_cast<std::size_t>(tokens.shape(0));
    const auto length = static_cast<std::size_t>(tokens.shape(1));

    const py::gil_scoped_release released;
    for (std::size_t index = 0; index < sequences; ++index) {
        const std::size_t begin = index * length;
        const Sequence<Token> sequence{all_tokens.subspan(begin, length),
                                       starts.empty() ? starts : starts.subspan(begin, length), eod};
        table.lookup(sequence, Matches{rows.subspan(begin, length), orders.subspan(begin, length)});
    }
}

void gather_rows(const std::vector<Array<std::uint16_t>>& blocks, const Array<std::int64_t>& rows,
                 Array<std::uint16_t> out) {
    require(rows.ndim() == 1 && out.ndim() == 2, "rows is [M] and out is [M, D]");
    require(rows.shape(0) == out.shape(0), "rows and out differ in length");
    std::vector<ColumnBlock> columns;
    for (const auto& block : blocks) {
        require(block.ndim() == 2, "a block is [N, D]");
        columns.push_back({static_cast<const std::byte*>(static_cast<const void*>(block.data())),
                           static_cast<std::size_t>(block.shape(0)),
                           static_cast<std::size_t>(block.shape(1)) * sizeof(std::uint16_t)});
    }
    const auto wanted = view(rows);
    const auto target = std::as_writable_bytes(writable_view(out, "out"));
    const py::gil_scoped_release released;
    megatron_graft::gather_rows(columns, wanted, target);
}

template <typename Token>
void define_lookup(py::class_<SuffixTable>& table) {
    table.def("lookup", &lookup<Token>, py::arg("tokens").noconvert(), py::arg("eod"),
              py::arg("document_starts").noconvert(), py::arg("rows_out").noconvert(),
              py::arg("orders_out").noconvert(),
              "Write row (int64, -1 at a miss) and order (uint8, 0 at a miss) for every token of [B, S].");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Longest-suffix lookup and row gather in C++.";
    module.attr("INTERFACE_VERSION") = kInterfaceVersion;

    py::class_<SuffixTable> table(module, "SuffixTable",
                                  "Exact longest-suffix lookup; immutable, thread-safe.");
    table.def(py::init(&make_table), py::arg("key_ids").noconvert(), py::arg("key_orders").noconvert(),
              py::arg("vocab_size"),
              "Build from int32 [N, max_order] right-aligned ids and uint8 [N] orders.");
    define_lookup<std::int32_t>(table);
    define_lookup<std::int64_t>(table);

    module.def("gather_rows", &gather_rows, py::arg("blocks").noconvert(), py::arg("rows").noconvert(),
               py::arg("out").noconvert(),
               "Copy rows (int64 [M], negative gives zeros) into out (uint16 [M, D]).");
}
