// Hashed n-grams in Python: megatron_graft._native.NgramHasher.

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "bindings.hpp"
#include "ngram_hash.hpp"
#include "thread_pool.hpp"

namespace megatron_graft {
namespace {

// An NgramHash and the number of threads that its calls are split over.
class ArrayNgramHash {
  public:
    ArrayNgramHash(const Array<std::int32_t>& compressed_ids, const Array<std::int64_t>& multipliers,
                   const Array<std::int64_t>& primes, const Array<std::int64_t>& offsets, std::int64_t pad,
                   std::optional<std::int64_t> eod, unsigned threads)
        : hash_({vector_of(compressed_ids, "compressed_ids"), vector_of(multipliers, "multipliers"),
                 vector_of(primes, "primes"), vector_of(offsets, "offsets"), pad, eod}),
          threads_(threads) {
        shared_pool(threads);  // a bad number of threads is an error here
    }

    template <typename Token>
    void rows(const Array<Token>& tokens, Array<std::int64_t> rows_out) const {
        require(tokens.ndim() == 2, "tokens is [B, S]");
        require(rows_out.ndim() == 3 && rows_out.shape(0) == tokens.shape(0) &&
                    rows_out.shape(1) == tokens.shape(1) &&
                    static_cast<std::size_t>(rows_out.shape(2)) == hash_.num_heads(),
                "rows_out is not [B, S, " + std::to_string(hash_.num_heads()) + "]");
        const auto given = view(tokens);
        const auto out = writable_view(rows_out, "rows_out");
        const auto length = static_cast<std::size_t>(tokens.shape(1));
        const ThreadPool& pool = shared_pool(threads_);  // after a fork, another one
        const py::gil_scoped_release released;
        hash_.rows(given, length, out, pool);
    }

    [[nodiscard]] std::size_t num_heads() const { return hash_.num_heads(); }

  private:
    template <typename Element>
    static std::span<const Element> vector_of(const Array<Element>& array, const std::string& name) {
        require(array.ndim() == 1, name + " has one dimension");
        return view(array);
    }

    NgramHash hash_;
    unsigned threads_;
};

template <typename Token>
void define_rows(py::class_<ArrayNgramHash>& hasher) {
    hasher.def("rows", &ArrayNgramHash::rows<Token>, py::arg("tokens").noconvert(),
               py::arg("rows_out").noconvert(),
               "Write the table rows (int64) that every token of [B, S] reads into [B, S, heads].");
}

}  // namespace

void define_hashing(py::module_& module) {
    py::class_<ArrayNgramHash> hasher(module, "NgramHasher",
                                      "Hashed n-grams of one layer; immutable, thread-safe.");
    hasher.def(py::init<const Array<std::int32_t>&, const Array<std::int64_t>&, const Array<std::int64_t>&,
                        const Array<std::int64_t>&, std::int64_t, std::optional<std::int64_t>, unsigned>(),
               py::arg("compressed_ids").noconvert(), py::arg("multipliers").noconvert(),
               py::arg("primes").noconvert(), py::arg("offsets").noconvert(), py::arg("pad"), py::arg("eod"),
               py::arg("threads"),
               "Copy the constants of a layer; eod is None where n-grams reach across documents.");
    define_rows<std::int32_t>(hasher);
    define_rows<std::int64_t>(hasher);
    hasher.def_property_readonly("num_heads", &ArrayNgramHash::num_heads);
}

}  // namespace megatron_graft
