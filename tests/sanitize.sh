#!/usr/bin/env bash
# Builds the CPU library with sanitizers and runs tests with it, once for each instruction set that this processor has.
#
#   [QUEST_OPS_SANITIZE_OUT=FILE.json] tests/sanitize.sh [SANITIZERS [ISAS [PYTEST ARGUMENTS...]]]
#
# SANITIZERS: address,undefined (default) or thread. ISAS: "generic avx2 avx512 avx512_vnni" (default) or some of them.
# FILE.json gets the counts of each instruction set that ran. A failure in one does not stop the others.
# `python -S` skips the editable install, which would load the library without sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizers=${1:-address,undefined}
isas=${2:-generic avx2 avx512 avx512_vnni}
tests=("${@:3}")
# Processes of tests load the library without sanitizers. Compiled code is torch's, and takes most of the time. The soak
# measures memory in use, and AddressSanitizer keeps freed memory.
[ ${#tests[@]} -gt 0 ] || tests=(tests/operators tests/cache tests/fuzz
  -k "not compile and not export and not inductor and not test_the_operators and not large_sizes and not soak")
export QUEST_OPS_TEST_EXAMPLES=${QUEST_OPS_TEST_EXAMPLES:-5} QUEST_OPS_FUZZ_CASES=${QUEST_OPS_FUZZ_CASES:-10}

build=build/sanitize-${sanitizers/,/-}
cmake -G Ninja -S . -B "$build" -D QUEST_CUDA=OFF -D QUEST_SANITIZE="$sanitizers" >"$build.log"
nice cmake --build "$build"
cmake --install "$build" --prefix "$build/python" >/dev/null
cp -r python/quest_ops "$build/python"

runtime=asan
case $sanitizers in
*thread*) runtime=tsan QUEST_OPS_TEST_THREADS=1 ;; # it does not see the barriers of torch's own threads
esac
export QUEST_OPS_TEST_THREADS=${QUEST_OPS_TEST_THREADS:-3}
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH="$PWD/$build/python:$packages"
# Python links no C++ library, and the runtime looks for the exceptions of one as it starts.
export LD_PRELOAD="$(gcc -print-file-name=lib$runtime.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 # Python and torch keep memory to the end
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=report_bugs=1:ignore_noninstrumented_modules=1:history_size=4
program='
import sys, quest_ops
from quest_ops import _library
library = _library._find("_C")
assert "build/sanitize" in str(library), library
assert b"__ubsan_" in library.read_bytes() or b"__tsan_" in library.read_bytes(), library
print(quest_ops.build_info["cpu_isa"])'
status=0 made=()
for isa in $isas; do
  export QUEST_OPS_ISA=$isa
  found=$(python -S -c "$program")
  if [ "$found" != "$isa" ]; then
    echo "$isa: not on this processor"
    continue
  fi
  echo "== $sanitizers, $isa"
  rm -f "$build/$isa.xml"
  python -S -m pytest -q --capture=sys -p no:cacheprovider --junit-xml="$build/$isa.xml" -m "not gpu and not slow" \
    "${tests[@]}" || status=1
  made+=("$isa")
  [ -z "${QUEST_OPS_SANITIZE_OUT:-}" ] || env -u LD_PRELOAD python tests/reliability/sanitize_summary.py "$build" \
    "${made[@]}" --sanitizers "$sanitizers" --tests="${tests[*]}" --out "$QUEST_OPS_SANITIZE_OUT"
done
exit $status
