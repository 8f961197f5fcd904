// The instructions that a hot loop may use, chosen when the program runs: one wheel serves every machine.
#pragma once

#include <string_view>

namespace megatron_graft {

// kAuto is the widest that the machine has. kPlain does one thing after the other, as one would write it
// first: it is there to be compared with.
enum class Body { kAuto, kPlain, kPortable, kAvx2, kAvx512 };

[[nodiscard]] bool body_available(Body body);

// The widest one that is available; never kAuto.
[[nodiscard]] Body widest_body();

// "auto", "plain", "portable", "avx2", "avx512". Throws std::invalid_argument for any other name.
[[nodiscard]] Body body_named(std::string_view name);

}  // namespace megatron_graft
