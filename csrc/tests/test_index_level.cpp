// One order of an index while it is built: what it takes of memory, and how many nodes it may have.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "built_index.hpp"
#include "check.hpp"
#include "index_level.hpp"

namespace megatron_graft::testing {
namespace {

std::size_t allocated = 0;
std::size_t most_allocated = 0;

template <typename Element>
struct CountingAllocator {
    using value_type = Element;
    Element* allocate(std::size_t count) {
        allocated += count;
        most_allocated = std::max(most_allocated, allocated);
        return std::allocator<Element>().allocate(count);
    }
    void deallocate(Element* elements, std::size_t count) {
        allocated -= count;
        std::allocator<Element>().deallocate(elements, count);
    }
    bool operator==(const CountingAllocator&) const = default;
};

TEST("a share that is larger than the one before it never lies in memory beside it") {
    std::vector<std::uint64_t, CountingAllocator<std::uint64_t>> elements;
    for (const std::size_t size : {1000U, 1010U, 900U, 1010U, 1100U}) {
        resize_anew(elements, size);
        CHECK_EQUAL(elements.size(), size);
        CHECK(allocated >= size);
    }
    CHECK_EQUAL(most_allocated, 1100U);
}

TEST("more nodes than ids of 32 bits are refused with their number and order") {
    KeySet keys;
    keys.add({1, 2, 3});
    keys.add({2, 2, 3});
    keys.add({1, 1, 1});
    const PackedKeys packed(keys);
    const KeyTable table = packed.table();
    const std::vector<std::uint32_t> parents = {3, 3, 1};  // at order 2, the newest tokens
    LevelCollector collector(table, 2, parents, 2, 4, one_thread());
    CHECK_EQUAL(collector.collect(0, 1, kMaxNodes - 2, {}).size(), 2U);
    CHECK_THROWS(
        std::length_error, collector.collect(0, 1, kMaxNodes - 1, {}),
        "suffixes of order 2 bring rows and phantoms to 4294967296, an index has at most 4294967295");
}

}  // namespace
}  // namespace megatron_graft::testing
