#!/usr/bin/env bash
# Say what to install if the C++ extension cannot be compiled here: a C++ compiler and Python's headers are needed.
set -euo pipefail

for compiler in "${CXX:-}" c++ g++ clang++; do
    # CXX may hold options as well ("ccache g++"): its first word is what must exist.
    if [ -n "$compiler" ] && command -v "${compiler%% *}" >/dev/null; then
        found=$compiler
        break
    fi
done
if [ -z "${found:-}" ]; then
    cat >&2 <<EOF
error: no C++ compiler found (looked for \$CXX, c++, g++, clang++). The lookup is a C++ extension; install one, e.g.:
    Debian, Ubuntu:  apt-get install g++
    Fedora:          dnf install gcc-c++
or name one in CXX, and run make again.
EOF
    exit 1
fi

headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
if [ ! -e "$headers/Python.h" ]; then
    cat >&2 <<EOF
error: Python.h not found in $headers. Install the headers of this Python (Debian, Ubuntu: apt-get install \
python3-dev; Fedora: dnf install python3-devel) and run make again.
EOF
    exit 1
fi
