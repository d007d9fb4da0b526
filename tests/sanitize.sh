#!/usr/bin/env bash
# Builds cbn with sanitizers, apart from other builds, and runs on it what reaches most of the compiled code: test files and CALLS random calls.
#
#     tests/sanitize.sh [address] [FILES]     AddressSanitizer and UndefinedBehaviorSanitizer; 100,000 calls
#     tests/sanitize.sh thread [FILES]        ThreadSanitizer; 20,000 calls. Needs setarch and LLVM's OpenMP runtime (Debian: libomp5-14), which
#                                             tells it of barriers, as GCC's doesn't. Forks and stores past the caches are beyond it.
#
# Any finding ends it. Needs gcc; a quarter of an hour on two cores, most of it to build. PYTHON is the interpreter, with what the tests need.
set -euo pipefail
python=$(realpath -s "$(command -v "${PYTHON:-python}")")
cd "$(dirname "$0")/.."
root=$PWD
kind=address
case ${1:-} in address | thread) kind=$1; shift ;; esac
if [ $kind = address ]; then
    flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    tests=(accuracy arrays errors failing_calls frozen gradients images layers nonfinite on_nonfinite properties statistics threads types)
    chosen=""
    # Python itself, NumPy and the OpenMP runtime leak at exit, or seem to.
    export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    export PYTHONMALLOC=malloc CBN_CACHE_BYTES=0    # each array in a block of its own
    sanitized=(env LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$python")
else
    flags="-fsanitize=thread"
    tests=(concurrency gradients layers memory statistics threads)
    chosen="not fork"
    llvm=$(dirname "$(ls /usr/lib/llvm-*/lib/libarcher.so | tail -1)")
    export OMP_TOOL_LIBRARIES=$llvm/libarcher.so OPENBLAS_NUM_THREADS=1 CALLS=${CALLS:-20000}
    export TSAN_OPTIONS="exitcode=66 halt_on_error=1 report_signal_unsafe=0 ignore_noninstrumented_modules=1"
    export CBN_STREAM_BYTES=inf                     # it doesn't see the instructions that store past the caches
    sanitized=(setarch -R env LD_PRELOAD="$(gcc -print-file-name=libtsan.so) $(ls "$llvm"/libomp.so*5)" "$python")
fi
export CBN_CFLAGS="-O1 -g1 -fno-omit-frame-pointer $flags"
LDFLAGS=$flags nice "$python" setup.py -q build --build-base build/$kind -j2
cd build/$kind/lib.*
export PYTHONPATH=$PWD
if [ $kind = thread ]; then
    # That it would find a race, and takes no barrier for one.
    race="import threading, numpy as np, cbn
x, out = np.ones((2, 16, 64, 16, 16), np.float32)
calls = [threading.Thread(target=lambda: [cbn.batch_norm_train(x, out=out) for _ in range(300)]) for _ in range(THREADS)]
[t.start() for t in calls], [t.join() for t in calls]"
    ARCHER_OPTIONS=verbose=1 "${sanitized[@]}" -c "${race/THREADS/1}" | grep "^Archer detected"
    status=0
    "${sanitized[@]}" -c "${race/THREADS/2}" 2> /dev/null || status=$?
    [ $status = 66 ]
fi
if [ $# -eq 0 ]; then
    set -- "${tests[@]/#/tests/test_}"
    set -- "${@/%/.py}"
fi
"${sanitized[@]}" -m pytest -q -p no:cacheprovider -m "not slow" -k "$chosen" "${@/#/$root/}"
"${sanitized[@]}" "$root/tests/fuzz.py" --seed 7 --calls "${CALLS:-100000}"
