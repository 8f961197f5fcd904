#!/usr/bin/env bash
# Runs what csrc/programs.mk built with a sanitizer: `asan` (the tests, and every kept input of the fuzzers) or `tsan`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_init_order=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
programs=build/native/$1

# The thread sanitizer of older compilers cannot place its shadow where the kernel spreads addresses widely.
fixed_addresses=()
if [ "$1" = tsan ] && ! TSAN_OPTIONS='' "$programs/run_tests" 'a checksum is' >/dev/null 2>&1; then
    fixed_addresses=(setarch "$(uname -m)" --addr-no-randomize)
fi
# The leak check traces its own process, which some containers forbid.
if [ "$1" = asan ] && ! "$programs/run_tests" 'a checksum is' >/dev/null 2>&1; then
    echo "leaks are not looked for: this machine does not let a process trace itself"
    ASAN_OPTIONS+=:detect_leaks=0
fi

status=0
if [ "$1" = asan ]; then
    for target in fuzz_open fuzz_lookup; do
        for kept in corpus regressions; do
            if [ -d "csrc/fuzz/$kept/$target" ]; then
                echo "$target, $kept:"
                "$programs/$target" "csrc/fuzz/$kept/$target" || status=1
            fi
        done
    done
fi
"${fixed_addresses[@]}" "$programs/run_tests" || status=1
exit "$status"
