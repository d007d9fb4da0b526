#!/usr/bin/env bash
# Makes CALLS random calls (10,000), of which a third fail, under valgrind, and shows what memory was lost, or used wrongly, in cbn: a block is
# cbn's where cbn is among the callers that asked for it. What Python, NumPy and the OpenMP runtime lose by themselves is left out. Ends with
# status 1 where there is any. Runs on the package as it is installed, on the CPU levels that valgrind knows (none with AVX-512); about five
# minutes. PYTHON is the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1
log=$(mktemp)
valgrind --leak-check=full --show-leak-kinds=definite,indirect --num-callers=40 --log-file="$log" \
    "${PYTHON:-python}" tests/fuzz.py --seed 9 --calls "${CALLS:-10000}"
grep -E "(definitely|indirectly) lost:" "$log"
# Valgrind parts its records by lines without text. What libraries do when they are loaded, by cbn's import, is theirs.
awk 'BEGIN { RS = "(==[0-9]+== *\n)+" } /\/cbn\/|__pyx_/ && !/ call_init / { print; found = 1 } END { exit found }' "$log"
