#!/usr/bin/env bash
# Builds cbn with AddressSanitizer and UndefinedBehaviorSanitizer, apart from other builds, and runs on it what reaches most of the compiled
# code: the given test files (by default the core of the suite) and CALLS random calls (100,000). Any finding ends it. Needs gcc; a quarter of an
# hour on two cores, most of it to build. PYTHON is the interpreter, with what the tests need.
set -euo pipefail
python=$(realpath -s "$(command -v "${PYTHON:-python}")")
cd "$(dirname "$0")/.."
export CBN_CFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
LDFLAGS="-fsanitize=address,undefined" nice "$python" setup.py -q build --build-base build/sanitized -j2
root=$PWD
cd build/sanitized/lib.*
# Python itself, NumPy and the OpenMP runtime leak at exit, or seem to.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc PYTHONPATH=$PWD CBN_CACHE_BYTES=0    # each array in a block of its own
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
tests=("$@")
if [ $# -eq 0 ]; then
    tests=(accuracy arrays errors failing_calls gradients layers nonfinite on_nonfinite properties statistics threads)
    tests=("${tests[@]/#/tests/test_}")
    tests=("${tests[@]/%/.py}")
fi
tests=("${tests[@]/#/$root/}")
LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}"
LD_PRELOAD=$preload "$python" "$root/tests/fuzz.py" --seed 7 --calls "${CALLS:-100000}"
