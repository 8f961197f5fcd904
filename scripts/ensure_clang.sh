#!/usr/bin/env bash
# Prints the name of a clang++ that can build libFuzzer programs; exits 1 if there is none. Where it is missing and
# this is root on a Debian system, it is installed (at most three minutes are spent on that). CLANGXX names another one.
set -uo pipefail

usable() {
    command -v "$1" >/dev/null || return 1
    local scratch
    scratch=$(mktemp -d) || return 1
    printf '%s\n' '#include <cstddef>' 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, std::size_t) { return 0; }' \
        >"$scratch/probe.cpp"
    local status=0
    "$1" -std=c++20 -fsanitize=fuzzer,address,undefined "$scratch/probe.cpp" -o "$scratch/probe" 2>/dev/null || status=1
    rm -rf "$scratch"
    return "$status"
}

find_usable() {
    local name
    for name in ${CLANGXX:-clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14}; do
        if usable "$name"; then
            echo "$name"
            return 0
        fi
    done
    return 1
}

find_usable && exit 0
if [ -z "${CLANGXX:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "no clang++ with libFuzzer: installing Debian's package clang" >&2
    export DEBIAN_FRONTEND=noninteractive
    if ! timeout 90 apt-get -qq install -y clang >/dev/null 2>&1; then
        timeout 60 apt-get -qq update >/dev/null 2>&1
        timeout 90 apt-get -qq install -y clang >/dev/null 2>&1
    fi
    find_usable && exit 0
fi
exit 1
