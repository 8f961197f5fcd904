#if defined(__x86_64__)

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "mixed_key.hpp"
#include "walk.hpp"

#define WALK_TARGET __attribute__((target("avx2,bmi,bmi2")))

namespace megatron_graft {
namespace {

WALK_TARGET inline std::uint32_t probe(const Bucket& bucket, std::uint32_t word) {
    const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.words.data()));
    const __m256i bare = _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(~kHasChild)));
    const __m256i same = _mm256_cmpeq_epi32(bare, _mm256_set1_epi32(static_cast<int>(word)));
    const auto lanes = static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(same)));
    return lanes | static_cast<std::uint32_t>(bucket.words[kLanes - 1] == kEmptyWord) << kLanes;
}

}  // namespace
}  // namespace megatron_graft

#include "walk_ring.hpp"

namespace megatron_graft {

WALK_TARGET void walk_avx2(const WalkTables& tables, const WalkBlock& block) {
    walk_in_ring(tables, block);
}

}  // namespace megatron_graft

#endif
