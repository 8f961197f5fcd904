// The walk of walk_ring.hpp with sixteen walkers to an instruction: only the look into a bucket is done one
// walker at a time. Read that file first; the chunks, the ring and the steps are the same.
#if defined(__x86_64__)

// gcc 12 finds the "undefined" inputs that its own intrinsics are written with uninitialised.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "walk.hpp"

#define WALK_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512cd,bmi,bmi2")))

namespace megatron_graft {
namespace {

constexpr std::size_t kVector = 16;
constexpr std::size_t kChunk = 128;
constexpr std::size_t kChunks = 3;
constexpr std::size_t kPadded = kChunk + kVector;  // a whole vector may be stored at any walker's place
// A step is the position's reach << 16 | order << 5 | displacement.
constexpr int kOrderAt = 5;
constexpr int kReachAt = 16;
constexpr std::uint32_t kDisplacements = (1U << kOrderAt) - 1;
constexpr std::uint32_t kOrders = 0xf;
constexpr std::uint32_t kFirstStep = 2U << kOrderAt;

struct alignas(64) Chunk {
    std::array<std::uint32_t, kPadded> position;
    std::array<std::uint32_t, kPadded> step;
    std::array<std::uint32_t, kPadded> parent;
    std::array<std::uint32_t, kPadded> word;
    std::array<const Bucket*, kPadded> bucket;
    std::array<std::uint8_t, kPadded> seen;  // bit k: lane k holds the word
    std::size_t size = 0;
};

// The longest match so far of every position of the block: row in the lower half, order (0 for none) above
// it.
using Best = std::array<std::uint64_t, kWalkBlock>;

// Sixteen numbers from an array, from its place `index` on.
template <typename Array>
WALK_TARGET inline __m512i load16(const Array& array, std::size_t index) {
    return _mm512_loadu_si512(array.data() + index);
}

template <typename Array>
WALK_TARGET inline void store16(Array& array, std::size_t index, __m512i values) {
    _mm512_storeu_si512(array.data() + index, values);
}

WALK_TARGET inline __m512i constant(std::uint32_t value) {
    return _mm512_set1_epi32(static_cast<int>(value));
}

// The first `count` of sixteen lanes.
WALK_TARGET inline __mmask16 first_lanes(std::size_t count) {
    return count >= kVector ? __mmask16{0xffff} : static_cast<__mmask16>((1U << count) - 1);
}

WALK_TARGET inline __m512i order_of(__m512i step) {
    return _mm512_and_si512(_mm512_srli_epi32(step, kOrderAt), constant(kOrders));
}

WALK_TARGET inline __m256i half(__m512i values, bool upper) {
    return upper ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values);
}

// Eight of sixteen numbers, widened to 64 bits.
WALK_TARGET inline __m512i wide(__m512i values, bool upper) {
    return _mm512_cvtepu32_epi64(half(values, upper));
}

WALK_TARGET inline __m512i join(__m256i lower, __m256i upper) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
}

WALK_TARGET inline void look(Chunk& chunk) {
    const __m256i bare = _mm256_set1_epi32(static_cast<int>(~kHasChild));
    for (std::size_t walker = 0; walker < chunk.size; ++walker) {
        const auto* const words = reinterpret_cast<const __m256i*>(chunk.bucket[walker]->words.data());
        const __m256i word = _mm256_set1_epi32(static_cast<int>(chunk.word[walker]));
        chunk.seen[walker] = _mm256_cmpeq_epi32_mask(_mm256_and_si256(_mm256_load_si256(words), bare), word);
    }
}

// For sixteen walkers, the 32 bits at `offset` bytes from their buckets, plus four bytes for each `lane`.
WALK_TARGET inline __m512i read_lanes(const Chunk& chunk, std::size_t first, __mmask16 wanted, __m512i lane,
                                      int offset) {
    __m256i values[2];
    for (std::size_t part = 0; part < 2; ++part) {
        const __m512i bucket = load16(chunk.bucket, first + part * 8);
        const __m512i bytes = wide(_mm512_slli_epi32(lane, 2), part == 1);
        const __m512i place = _mm512_add_epi64(_mm512_add_epi64(bucket, bytes), _mm512_set1_epi64(offset));
        const auto mask = static_cast<__mmask8>(wanted >> (8 * part));
        values[part] = _mm512_mask_i64gather_epi32(_mm256_setzero_si256(), mask, place, nullptr, 1);
    }
    return join(values[0], values[1]);
}

// What sixteen walkers found.
struct Findings {
    __mmask16 found;
    __m512i id;
    __m512i
        word;  // of the lane found; of the last lane, which says if the bucket has overflowed, if none was
};

WALK_TARGET inline Findings read_findings(const Chunk& chunk, std::size_t first, __mmask16 there) {
    const __m512i seen =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk.seen.data() + first)));
    const __mmask16 found = _mm512_mask_test_epi32_mask(there, seen, seen);
    const __m512i lowest = _mm512_and_si512(seen, _mm512_sub_epi32(_mm512_setzero_si512(), seen));
    const __m512i lane =
        _mm512_mask_sub_epi32(constant(kLanes - 1), found, constant(31), _mm512_lzcnt_epi32(lowest));
    return {found, read_lanes(chunk, first, found, lane, offsetof(Bucket, ids)),
            read_lanes(chunk, first, there, lane, offsetof(Bucket, words))};
}

WALK_TARGET inline void keep_rows(Best& best, __mmask16 is_row, __m512i position, __m512i id, __m512i order) {
    for (int part = 0; part < 2; ++part) {
        const bool upper = part == 1;
        const __m512i match = _mm512_or_si512(wide(id, upper), _mm512_slli_epi64(wide(order, upper), 32));
        const auto mask = static_cast<__mmask8>(is_row >> (8 * part));
        _mm512_mask_i32scatter_epi64(best.data(), mask, half(position, upper), match, 8);
    }
}

WALK_TARGET inline void take_step(const WalkTables& tables, Chunk& chunk, Best& best) {
    look(chunk);
    const std::size_t size = chunk.size;
    const __m512i displacements = constant(kDisplacements);
    std::size_t kept = 0;
    for (std::size_t first = 0; first < size; first += kVector) {
        const __mmask16 there = first_lanes(size - first);
        const Findings findings = read_findings(chunk, first, there);
        const __mmask16 found = findings.found;
        const auto missing = static_cast<__mmask16>(there & ~found);
        const __m512i position = load16(chunk.position, first);
        const __m512i step = load16(chunk.step, first);
        const __m512i order = order_of(step);
        const __mmask16 is_row = _mm512_mask_cmplt_epu32_mask(found, findings.id, constant(tables.row_limit));
        keep_rows(best, is_row, position, findings.id, order);

        // The bit that says "has children" is the sign.
        const __mmask16 deeper =
            _mm512_mask_cmpgt_epu32_mask(_mm512_mask_cmplt_epi32_mask(found, findings.word, constant(0)),
                                         _mm512_srli_epi32(step, kReachAt), order);
        const __mmask16 aside = _mm512_mask_cmplt_epu32_mask(
            _mm512_mask_cmpneq_epu32_mask(missing, findings.word, constant(kEmptyWord)),
            _mm512_and_si512(step, displacements), constant(kMaxDisplacement));
        const __mmask16 stays = deeper | aside;
        const __m512i next_step =
            _mm512_add_epi32(_mm512_mask_or_epi32(step, deeper, step, displacements), constant(1));
        const __m512i parent = _mm512_mask_mov_epi32(load16(chunk.parent, first), deeper, findings.id);
        store16(chunk.position, kept, _mm512_maskz_compress_epi32(stays, position));
        store16(chunk.step, kept, _mm512_maskz_compress_epi32(stays, next_step));
        store16(chunk.parent, kept, _mm512_maskz_compress_epi32(stays, parent));
        kept += static_cast<std::size_t>(__builtin_popcount(stays));
    }
    chunk.size = kept;
}

// Places of the positions' newest tokens.
WALK_TARGET inline __m512i newest_places(const WalkBlock& block, __m512i position) {
    return block.stride == 1
               ? position
               : _mm512_mullo_epi32(position, constant(static_cast<std::uint32_t>(block.stride)));
}

WALK_TARGET inline __m512i read_tokens(const WalkBlock& block, __mmask16 wanted, __m512i place) {
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), wanted, place, block.tokens, 4);
}

// Sixteen positions from `next` on, of which those that can have an n-gram of two tokens become walkers.
WALK_TARGET inline std::size_t admit(const WalkTables& tables, const WalkBlock& block, Chunk& chunk,
                                     Best& best, std::size_t next) {
    const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    while (chunk.size + kVector <= kChunk && next < block.count) {
        const __mmask16 there = first_lanes(block.count - next);
        const __m512i position = _mm512_add_epi32(constant(static_cast<std::uint32_t>(next)), iota);
        const __m512i token = read_tokens(block, there, newest_places(block, position));
        const __m512i reach = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, block.reach + next));
        __m512i row = constant(kNoRow);
        __mmask16 is_row = 0;
        if (tables.unigrams != nullptr) {
            const __mmask16 usable = _mm512_mask_cmpgt_epu32_mask(there, reach, constant(0));
            row = _mm512_mask_i32gather_epi32(row, usable, token, tables.unigrams, 4);
            is_row = _mm512_cmplt_epu32_mask(row, constant(tables.row_limit));
        }
        // Vectors may reach beyond the block's end, but not beyond the array: kWalkBlock is whole vectors.
        const __m512i order = _mm512_maskz_mov_epi32(is_row, constant(1));
        for (std::size_t part = 0; part < 2; ++part) {
            const bool upper = part == 1;
            store16(best, next + part * 8,
                    _mm512_or_si512(wide(row, upper), _mm512_slli_epi64(wide(order, upper), 32)));
        }
        const __mmask16 walks = _mm512_mask_cmpgt_epu32_mask(there, reach, constant(1));
        store16(chunk.position, chunk.size, _mm512_maskz_compress_epi32(walks, position));
        store16(chunk.parent, chunk.size, _mm512_maskz_compress_epi32(walks, token));
        const __m512i step = _mm512_or_si512(_mm512_slli_epi32(reach, kReachAt), constant(kFirstStep));
        store16(chunk.step, chunk.size, _mm512_maskz_compress_epi32(walks, step));
        chunk.size += static_cast<std::size_t>(__builtin_popcount(walks));
        next += kVector;
    }
    return next < block.count ? next : block.count;
}

// What aim() needs of the tables, in registers: entry k of a table belongs to order k + 1.
struct Levels {
    __m512i buckets;
    __m512i homes;
};

WALK_TARGET inline Levels levels_of(const WalkTables& tables) {
    alignas(64) std::array<std::uint64_t, kMaxOrder> buckets{};
    alignas(64) std::array<std::uint64_t, kMaxOrder> homes{};
    for (std::size_t order = 2; order <= kMaxOrder; ++order) {
        buckets[order - 1] = reinterpret_cast<std::uintptr_t>(tables.levels[order].buckets);
        homes[order - 1] = tables.levels[order].homes;
    }
    return {_mm512_load_si512(buckets.data()), _mm512_load_si512(homes.data())};
}

WALK_TARGET inline __m512i mix(__m512i key, __m512i mask, __m128i half_bits) {
    __m512i mixed = _mm512_and_si512(key, mask);
    mixed = _mm512_xor_si512(mixed, _mm512_srl_epi64(mixed, half_bits));
    mixed = _mm512_mullo_epi64(mixed, _mm512_set1_epi64(static_cast<std::int64_t>(0x9e3779b97f4a7c15ULL)));
    mixed = _mm512_and_si512(mixed, mask);
    mixed = _mm512_xor_si512(mixed, _mm512_srl_epi64(mixed, half_bits));
    mixed = _mm512_mullo_epi64(mixed, _mm512_set1_epi64(static_cast<std::int64_t>(0xd6e8feb86659fd93ULL)));
    mixed = _mm512_and_si512(mixed, mask);
    return _mm512_xor_si512(mixed, _mm512_srl_epi64(mixed, half_bits));
}

WALK_TARGET inline void aim(const WalkTables& tables, const WalkBlock& block, const Levels& levels,
                            Chunk& chunk) {
    const __m512i mask = _mm512_set1_epi64(static_cast<std::int64_t>((1ULL << tables.key_bits) - 1));
    const __m128i half_bits = _mm_cvtsi32_si128(static_cast<int>((tables.key_bits + 1) / 2));
    const __m128i token_bits = _mm_cvtsi32_si128(static_cast<int>(tables.token_bits));
    const __m128i to_top = _mm_cvtsi32_si128(static_cast<int>(64 - tables.key_bits));
    for (std::size_t first = 0; first < chunk.size; first += kVector) {
        const __mmask16 there = first_lanes(chunk.size - first);
        const __m512i step = load16(chunk.step, first);
        const __m512i age = _mm512_sub_epi32(order_of(step), constant(1));
        const __m512i displacement = _mm512_and_si512(step, constant(kDisplacements));
        const __m512i position = load16(chunk.position, first);
        const __m512i token =
            read_tokens(block, there, _mm512_sub_epi32(newest_places(block, position), age));
        const __m512i parent = load16(chunk.parent, first);
        __m256i remainder[2];
        for (std::size_t part = 0; part < 2; ++part) {
            const bool upper = part == 1;
            const __m512i key =
                _mm512_or_si512(_mm512_sll_epi64(wide(parent, upper), token_bits), wide(token, upper));
            const __m512i mixed = mix(key, mask, half_bits);
            const __m512i top = _mm512_srli_epi64(_mm512_sll_epi64(mixed, to_top), 32);
            const __m512i homes = _mm512_permutexvar_epi64(wide(age, upper), levels.homes);
            const __m512i home = _mm512_srli_epi64(_mm512_mul_epu32(top, homes), 32);
            const __m512i bytes = _mm512_slli_epi64(_mm512_add_epi64(home, wide(displacement, upper)), 6);
            const __m512i buckets = _mm512_permutexvar_epi64(wide(age, upper), levels.buckets);
            store16(chunk.bucket, first + part * 8, _mm512_add_epi64(buckets, bytes));
            remainder[part] = _mm512_cvtepi64_epi32(mixed);
        }
        const __m512i bare = _mm512_and_si512(join(remainder[0], remainder[1]), constant(kRemainderMask));
        store16(chunk.word, first, _mm512_or_si512(bare, _mm512_slli_epi32(displacement, kRemainderBits)));
        // Here and not all at the end: few lines can be on their way at once, and there is work meanwhile.
        // Into the second-level cache, which has more of them on their way than the first.
        for (std::size_t walker = first; walker < std::min(first + kVector, chunk.size); ++walker) {
            __builtin_prefetch(chunk.bucket[walker], 0, 2);
        }
    }
}

WALK_TARGET inline void write_out(const WalkBlock& block, const Best& best) {
    constexpr std::size_t kMatches = kVector / 2;
    for (std::size_t position = 0; position < block.count; position += kMatches) {
        const auto there = static_cast<__mmask8>(first_lanes(block.count - position) & 0xff);
        const __m512i match = load16(best, position);
        const __m512i order = _mm512_srli_epi64(match, 32);
        const __mmask8 is_row = _mm512_test_epi64_mask(order, order);
        const __m512i row =
            _mm512_mask_and_epi64(_mm512_set1_epi64(-1), is_row, match, _mm512_set1_epi64(0xffffffff));
        _mm512_mask_storeu_epi64(block.rows + position, there, row);
        _mm512_mask_cvtepi64_storeu_epi8(block.orders + position, there, order);
    }
}

}  // namespace

WALK_TARGET void walk_avx512(const WalkTables& tables, const WalkBlock& block) {
    std::array<Chunk, kChunks> ring;
    alignas(64) Best best;
    const Levels levels = levels_of(tables);
    std::size_t next = 0;
    std::size_t walking = 1;
    while (walking != 0 || next < block.count) {
        walking = 0;
        for (Chunk& chunk : ring) {
            take_step(tables, chunk, best);
            next = admit(tables, block, chunk, best, next);
            aim(tables, block, levels, chunk);
            walking += chunk.size;
        }
    }
    write_out(block, best);
}

}  // namespace megatron_graft

#endif
