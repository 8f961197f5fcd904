#!/usr/bin/env bash
# Install the hash tables that the lookup bench compares with, where that is possible without asking: as root on
# Debian or Ubuntu. Elsewhere say what to install. The bench runs without them and reports which it could compare.
set -euo pipefail

packages=(libabsl-dev libboost1.81-dev robin-map-dev)

# Do the three headers exist for the compiler that will be used?
have_headers() {
    echo '#include <absl/container/flat_hash_map.h>
#include <boost/unordered/unordered_flat_map.hpp>
#include <tsl/robin_map.h>' | ${CXX:-g++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null
}

if have_headers; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    if apt-get install -y --no-install-recommends "${packages[@]}" >/dev/null 2>&1 && have_headers; then
        echo "installed ${packages[*]}"
        exit 0
    fi
fi
cat >&2 <<MESSAGE
note: not all of the hash tables to compare with are installed; the bench goes on with those that are. They are
    Debian, Ubuntu:  apt-get install ${packages[*]} pkg-config
    elsewhere:       abseil, boost 1.81 or newer, robin-map, pkg-config
MESSAGE
