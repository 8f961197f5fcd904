#!/usr/bin/env bash
# Builds the extension with g++'s address sanitizer in a copy of the package below build/, and runs the Python tests
# of bank and lookup (or those given) against it. Leaks are the C++ tests' matter: Python itself leaks at its end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

repository=$PWD
copy=$repository/build/python-asan
mkdir -p "$copy"
cp -r --update setup.py pyproject.toml csrc megatron_graft tools examples tests "$copy/"
cd "$copy"
rm -f megatron_graft/_native*.so
CXX=g++ CC=gcc CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address -D_GLIBCXX_ASSERTIONS" \
    LDFLAGS="-fsanitize=address" python setup.py --quiet build_ext --inplace
export PYTHONPATH=$copy OMP_NUM_THREADS=1 PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
arguments=("$@")
[ $# -gt 0 ] || arguments=(tests/unit/lookup tests/unit/bank)
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    python -m pytest -q -p no:cacheprovider "${arguments[@]}"
