#!/usr/bin/env bash
# Runs both fuzz targets at once, for a number of seconds each, from the kept corpus on.
#
#   scripts/fuzz.sh <seconds>     fuzz; what reaches new code is collected in build/fuzz/<target>/
#   scripts/fuzz.sh keep          add to the kept corpus what was collected and reaches code that nothing kept reaches
#
# With clang: libFuzzer, guided by coverage. Without: a driver of our own that changes kept inputs at random.
# An input that ends in a crash, a sanitizer's report, a wrong answer, or takes more than ten seconds or 2 GB, is
# left as build/fuzz/<target>-*, to be put into csrc/fuzz/regressions/<target>/ with its fix.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

targets=(fuzz_open fuzz_lookup)
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
mkdir -p build/fuzz
# Files of a few kilobytes by the million: in memory if possible.
scratch=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch

build() {
    make --silent --no-print-directory -j"$(nproc)" -f csrc/programs.mk "$@" "${targets[@]}"
}

# The inputs that are kept in the repository: $kept.
find_kept() {
    kept=("csrc/fuzz/corpus/$1")
    if [ -d "csrc/fuzz/regressions/$1" ]; then
        kept+=("csrc/fuzz/regressions/$1")
    fi
}

run_libfuzzer() {
    local target=$1 seconds=$2 kept
    find_kept "$target"
    mkdir -p "build/fuzz/$target"
    "build/native/fuzz/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=32768 \
        -print_final_stats=1 -artifact_prefix="build/fuzz/$target-" "build/fuzz/$target" \
        "${kept[@]}" >"build/fuzz/$target.log" 2>&1
}

run_standalone() {
    local target=$1 seconds=$2 kept
    find_kept "$target"
    "build/native/asan/$target" --seconds "$seconds" --seed "$RANDOM" --timeout 10 --rss-limit-mb 2048 \
        --failure "build/fuzz/$target-failure" "${kept[@]}" >"build/fuzz/$target.log" 2>&1
}

fuzz() {
    local run=$1 seconds=$2 status=0 target
    declare -A running
    for target in "${targets[@]}"; do
        "$run" "$target" "$seconds" &
        running[$target]=$!
    done
    for target in "${targets[@]}"; do
        if wait "${running[$target]}"; then
            echo "$target: clean; $(grep -E 'number_of_executed_units|changes of them' "build/fuzz/$target.log" | tr -s ' ')"
        else
            status=1
            tail -n 60 "build/fuzz/$target.log"
            echo "$target: FAILED, see build/fuzz/$target.log"
        fi
    done
    return "$status"
}

[ $# = 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
clang=$(scripts/ensure_clang.sh) || clang=
if [ -n "$clang" ]; then
    build FLAVOUR=fuzz CXX="$clang"
fi
if [ "$1" = keep ]; then
    [ -n "$clang" ] || { echo "keep: needs clang with libFuzzer" >&2; exit 1; }
    for target in "${targets[@]}"; do
        "build/native/fuzz/$target" -use_counters=0 -merge=1 "csrc/fuzz/corpus/$target" "build/fuzz/$target" 2>&1 | tail -n 1
    done
elif [ -n "$clang" ]; then
    fuzz run_libfuzzer "$1"
else
    echo "no clang with libFuzzer: kept inputs are changed at random instead"
    build FLAVOUR=asan
    fuzz run_standalone "$1"
fi
