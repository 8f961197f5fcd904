#include "body.hpp"

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_graft {

bool body_available(Body body) {
#if defined(__x86_64__)
    if (body == Body::kAvx2) {
        return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("bmi") != 0 &&
               __builtin_cpu_supports("bmi2") != 0;
    }
    if (body == Body::kAvx512) {
        return body_available(Body::kAvx2) && __builtin_cpu_supports("avx512f") != 0 &&
               __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
               __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512cd") != 0;
    }
#endif
    return body == Body::kAuto || body == Body::kPlain || body == Body::kPortable;
}

Body widest_body() {
    for (const Body body : {Body::kAvx512, Body::kAvx2}) {
        if (body_available(body)) {
            return body;
        }
    }
    return Body::kPortable;
}

Body body_named(std::string_view name) {
    constexpr std::array<std::pair<std::string_view, Body>, 5> kNames = {{{"auto", Body::kAuto},
                                                                          {"plain", Body::kPlain},
                                                                          {"portable", Body::kPortable},
                                                                          {"avx2", Body::kAvx2},
                                                                          {"avx512", Body::kAvx512}}};
    for (const auto& [known, body] : kNames) {
        if (known == name) {
            return body;
        }
    }
    throw std::invalid_argument("there is no body " + std::string(name) +
                                ", expected auto, plain, portable, avx2 or avx512");
}

}  // namespace megatron_graft
