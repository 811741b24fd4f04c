#!/usr/bin/env bash
# Builds the CPU library with gcov's counters, runs tests with each instruction set, and reports the lines of C++ run.
#
#   tests/reliability/cpp_coverage.sh REPORT.json [PYTEST ARGUMENTS...]
#
# REPORT.json is gcovr's summary. Branches that only exceptions take are left out. `python -S` skips the editable
# install, which would load the library without counters.
set -euo pipefail
cd "$(dirname "$0")/../.."

report=$1
tests=("${@:2}")
[ ${#tests[@]} -gt 0 ] || tests=(tests/operators tests/fuzz
  -k "not compile and not export and not inductor and not fake and not meta and not large_sizes")
export QUEST_OPS_TEST_EXAMPLES=${QUEST_OPS_TEST_EXAMPLES:-5} QUEST_OPS_FUZZ_CASES=${QUEST_OPS_FUZZ_CASES:-10}

build=build/coverage
cmake -G Ninja -S . -B "$build" -D QUEST_CUDA=OFF -D CMAKE_BUILD_TYPE=Debug \
  -D "CMAKE_CXX_FLAGS=--coverage -O1 -fexpensive-optimizations -fprofile-update=prefer-atomic" >"$build.log"
cmake --build "$build"
cmake --install "$build" --prefix "$build/python" >/dev/null
cp -r python/quest_ops "$build/python"
find "$build" -name "*.gcda" -delete

packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH="$PWD/$build/python:$packages"
# Instruction sets differ in the loops alone, and the fuzzer calls them all.
for isa in generic avx2 avx512 avx512_vnni; do
  export QUEST_OPS_ISA=$isa
  [ "$isa" = generic ] || tests=(tests/fuzz)
  [ "$(python -S -c 'import quest_ops; print(quest_ops.build_info["cpu_isa"])')" = "$isa" ] || continue
  python -S -m pytest -q -p no:cacheprovider -m "not gpu and not slow" "${tests[@]}"
done
gcovr --root . --filter csrc/ --merge-lines --exclude-throw-branches --exclude-unreachable-branches \
  --json-summary "$report" "$build"
