// What the files of the Python module share: arrays taken as they are, and checked before a pointer leaves.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace megatron_graft {

namespace py = pybind11;

template <typename Element>
using Array = py::array_t<Element, py::array::c_style>;

inline void require(bool condition, const std::string& message) {
    if (!condition) {
        throw std::invalid_argument(message);
    }
}

inline void require_same_shape(const py::array& left, const py::array& right, const std::string& message) {
    require(
        left.ndim() == right.ndim() && std::equal(left.shape(), left.shape() + left.ndim(), right.shape()),
        message);
}

template <typename Element>
void require_aligned(const Element* data) {
    require(reinterpret_cast<std::uintptr_t>(data) % alignof(Element) == 0,
            "an array is not aligned to its elements");
}

template <typename Element>
std::span<const Element> view(const Array<Element>& array) {
    require_aligned(array.data());
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <typename Element>
std::span<Element> writable_view(Array<Element>& array, const std::string& name) {
    require(array.writeable(), name + " is read-only");
    require_aligned(array.data());
    return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

// Adds NgramHasher to the module (bindings_hash.cpp).
void define_hashing(py::module_& module);
// Adds count_slice and sum_partition (bindings_count.cpp).
void define_counting(py::module_& module);

}  // namespace megatron_graft
