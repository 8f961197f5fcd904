// Text that behaves like language for a lookup: tokens with Zipf's distribution, contexts that repeat, fixed
// phrases, documents. It is a stand-in with a known recipe, so that a bank of any size can be made anywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "../thread_pool.hpp"

namespace megatron_graft::bench {

inline constexpr std::int32_t kEod = 0;

struct TextOptions {
    std::uint64_t tokens = 0;
    std::uint32_t vocab_size = 0;  // at least 2; token 0 ends a document
    std::uint64_t seed = 0;        // chooses the text; all texts of one vocabulary are of one language
};

// The same tokens for any number of threads.
std::vector<std::int32_t> synthetic_text(const TextOptions& options, const ThreadPool& pool);

}  // namespace megatron_graft::bench
