# Builds the C++ programs that are no part of the extension: tests, the proof of the lookup, fuzzers.
#
#   make -f csrc/programs.mk FLAVOUR=<flavour> <program>...      from the root of the repository
#
# Flavours, each in a directory of its own below build/native/:
#   release   as shipped, but with the standard library's own checks
#   fast      as shipped
#   asan      address and undefined-behaviour sanitizers
#   tsan      thread sanitizer
#   fuzz      asan, with clang and libFuzzer (CXX is set by scripts/fuzz.sh)
# Programs: tests, prove_lookup, fuzz_open, fuzz_lookup. Without clang, the fuzzers get a driver of our own.

FLAVOUR ?= release
OUT := build/native/$(FLAVOUR)

FLAGS_release := -O2 -D_GLIBCXX_ASSERTIONS
FLAGS_fast := -O3
FLAGS_asan := -O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined \
              -fno-sanitize-recover=all
FLAGS_tsan := -O1 -g1 -D_GLIBCXX_ASSERTIONS -fsanitize=thread
# Comparisons are not traced: the targets make headers that are right, so there is no magic number to guess, and
# tracing those of the checksum takes most of the time.
FLAGS_fuzz := -O2 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -fsanitize=fuzzer-no-link,address,undefined \
              -fno-sanitize-coverage=trace-cmp -fno-sanitize-recover=all
LINK_fuzz := -fsanitize=fuzzer
FLAGS := -std=c++20 -pthread -Icsrc -Wall -Wextra -Wconversion -Wshadow $(FLAGS_$(FLAVOUR)) $(CXXFLAGS)

objects = $(patsubst csrc/%.cpp,$(OUT)/%.o,$(1))
LIBRARY := $(call objects,$(filter-out csrc/bindings%,$(wildcard csrc/*.cpp)))
TESTS := $(call objects,csrc/tests/check_main.cpp $(wildcard csrc/tests/test_*.cpp))
FUZZ_DRIVER := $(if $(filter fuzz,$(FLAVOUR)),,$(OUT)/fuzz/standalone.o)

.PHONY: tests prove_lookup fuzz_open fuzz_lookup
tests: $(OUT)/run_tests
prove_lookup fuzz_open fuzz_lookup: %: $(OUT)/%

$(OUT)/run_tests: $(TESTS) $(LIBRARY)
$(OUT)/prove_lookup: $(OUT)/tests/prove_lookup.o $(LIBRARY)
$(OUT)/fuzz_open $(OUT)/fuzz_lookup: $(OUT)/%: $(OUT)/fuzz/%.o $(FUZZ_DRIVER) $(LIBRARY)

$(OUT)/run_tests $(OUT)/prove_lookup $(OUT)/fuzz_open $(OUT)/fuzz_lookup:
	@$(CXX) $(FLAGS) $(if $(findstring /fuzz_,$@),$(LINK_$(FLAVOUR))) $^ -o $@

# Flags are part of what an object depends on: this file is where they stand.
$(OUT)/%.o: csrc/%.cpp csrc/programs.mk
	@mkdir -p $(@D)
	@$(CXX) $(FLAGS) -MMD -MP -c $< -o $@

-include $(shell find $(OUT) -name '*.d' 2>/dev/null)
