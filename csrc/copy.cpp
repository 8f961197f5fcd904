#include "copy.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

// Functions compiled for one instruction set, whatever the compiler's flags say.
#define COPY_BASELINE
#if defined(__x86_64__)
#include <immintrin.h>
#define COPY_AVX2 __attribute__((target("avx2")))
#define COPY_AVX512 __attribute__((target("avx512f")))
#endif

namespace megatron_graft {
namespace {

constexpr std::size_t kLineBytes = 64;

// The second-level cache: what is asked for stays there until its turn, while the first level and its few
// line buffers remain free for the copy itself (measured: into the first level, a quarter slower). One line
// for each line copied keeps the memory evenly busy; a whole row at once stalls behind full buffers (10 %
// slower).
[[gnu::always_inline]] inline void prefetch_line(const std::byte* address) {
    __builtin_prefetch(address, 0, 2);
}

std::size_t bytes_past_line(const std::byte* address) {
    return reinterpret_cast<std::uintptr_t>(address) % kLineBytes;
}

// Bytes in front of the target's first whole line.
std::size_t head_bytes(const std::byte* target, std::size_t bytes) {
    const std::size_t past = bytes_past_line(target);
    return past == 0 ? 0 : std::min(bytes, kLineBytes - past);
}

#if defined(__x86_64__)

[[gnu::always_inline]] inline void stream_line_portable(std::byte* target, const std::byte* source) {
    for (std::size_t offset = 0; offset < kLineBytes; offset += sizeof(__m128i)) {
        const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + offset));
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + offset), part);
    }
}

[[gnu::always_inline]] COPY_AVX2 inline void stream_line_avx2(std::byte* target, const std::byte* source) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + sizeof(__m256i)));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + sizeof(__m256i)), high);
}

[[gnu::always_inline]] COPY_AVX512 inline void stream_line_avx512(std::byte* target,
                                                                  const std::byte* source) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
}

#else

[[gnu::always_inline]] inline void stream_line_portable(std::byte* target, const std::byte* source) {
    std::memcpy(target, source, kLineBytes);
}

#endif

[[gnu::always_inline]] inline void keep_line(std::byte* target, const std::byte* source) {
    std::memcpy(target, source, kLineBytes);
}

void plain_piece(std::byte* target, const std::byte* source, const std::byte* /*ahead*/, std::size_t bytes) {
    if (bytes > 0) {
        std::memcpy(target, source, bytes);
    }
}

// One text for all bodies. A macro, because a template or a lambda would not be compiled for the instruction
// set of the function that uses it.
#define DEFINE_COPY_PIECE(copy_piece, copy_line, instruction_set)                                       \
    instruction_set void copy_piece(std::byte* target, const std::byte* source, const std::byte* ahead, \
                                    std::size_t bytes) {                                                \
        std::size_t offset = head_bytes(target, bytes);                                                 \
        if (offset > 0) {                                                                               \
            prefetch_line(ahead);                                                                       \
            std::memcpy(target, source, offset);                                                        \
        }                                                                                               \
        for (; bytes - offset >= kLineBytes; offset += kLineBytes) {                                    \
            prefetch_line(ahead + offset);                                                              \
            copy_line(target + offset, source + offset);                                                \
        }                                                                                               \
        if (bytes > offset || (bytes > 0 && bytes_past_line(ahead) != 0)) {                             \
            prefetch_line(ahead + bytes - 1);                                                           \
            std::memcpy(target + offset, source + offset, bytes - offset);                              \
        }                                                                                               \
    }

DEFINE_COPY_PIECE(keep_piece, keep_line, COPY_BASELINE)
DEFINE_COPY_PIECE(stream_piece_portable, stream_line_portable, COPY_BASELINE)
#if defined(__x86_64__)
DEFINE_COPY_PIECE(stream_piece_avx2, stream_line_avx2, COPY_AVX2)
DEFINE_COPY_PIECE(stream_piece_avx512, stream_line_avx512, COPY_AVX512)
#endif

}  // namespace

CopyBody copy_body(Body body) {
    if (!body_available(body)) {
        throw std::invalid_argument("this machine lacks the instructions asked for");
    }
    switch (body == Body::kAuto ? widest_body() : body) {
        case Body::kPlain:
            return {plain_piece, plain_piece};
#if defined(__x86_64__)
        case Body::kAvx2:
            return {stream_piece_avx2, keep_piece};
        case Body::kAvx512:
            return {stream_piece_avx512, keep_piece};
#endif
        default:
            return {stream_piece_portable, keep_piece};
    }
}

void finish_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace megatron_graft
