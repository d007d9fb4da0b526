#!/usr/bin/env bash
# Builds cbn for ARM64 and runs it there, emulated, on an x86-64 machine: the lanes' operations, the hashes of same_bits.json, accuracy, and CALLS
# drawn calls (20,000), whose results must be those of this machine, bit for bit.
#
#     tests/arm64.sh              ten minutes on two cores, most of it emulation
#     tests/arm64.sh build        no tests
#     tests/arm64.sh run ...      Python on ARM64 with these arguments, after a build: tests/arm64.sh run -m pytest tests/test_types.py
#
# Needs Debian with the packages gcc-aarch64-linux-gnu and qemu-user-static. PYTHON is the interpreter that builds: it has cbn and what building and
# its tests need, and is of the version that the Debian release has. Below build/arm64: `root` has Debian's Python for ARM64, unpacked and not
# installed; `site` the wheels; `lib` cbn.
set -euo pipefail
python=$(realpath -s "$(command -v "${PYTHON:-python}")")
cd "$(dirname "$0")/.."
tests=$PWD/tests
base=$PWD/build/arm64
root=$base/root
version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')

unpack() {
    local apt="-o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State=$base/apt -o Dir::Cache=$base/apt"
    apt+=" -o Dir::State::status=/dev/null"
    mkdir -p "$base/apt/lists/partial" "$base/apt/archives/partial" "$base/deb" "$root"
    # shellcheck disable=SC2086     # options
    apt-get $apt -q update
    # shellcheck disable=SC2086
    (cd "$base/deb" && apt-get $apt -q download "python$version-minimal" "libpython$version-"{minimal,stdlib,dev} \
        libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1)
    for package in "$base"/deb/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    "$python" -m pip install -q --target "$base/site" --only-binary :all: --python-version "$version" --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        "numpy==$("$python" -c 'import numpy; print(numpy.__version__)')" ml_dtypes pytest hypothesis
}

# What setup.py asks sysconfig is answered for ARM64.
build() {
    local data=_sysconfigdata__aarch64-linux-gnu
    mkdir -p "$base/sysconfig"
    cp "$root/usr/lib/python$version/$data.py" "$base/sysconfig"
    PYTHONPATH=$base/sysconfig _PYTHON_SYSCONFIGDATA_NAME=$data _PYTHON_HOST_PLATFORM=linux-aarch64 CBN_OPENMP=on \
        CFLAGS="-I$root/usr/include/python$version -I$root/usr/include" \
        "$python" setup.py -q build --build-base "$base" --build-lib "$base/lib"
}

# Within `lib`, so that cbn is the one there and not its source.
run() {
    cd "$base/lib"
    PYTHONHOME=$root/usr PYTHONPATH=$base/lib:$base/site PYTHONDONTWRITEBYTECODE=1 CC=aarch64-linux-gnu-gcc OPENBLAS_NUM_THREADS=1 \
        qemu-aarch64-static -L "$root" "$root/usr/bin/python$version" "${@/#tests\//$tests/}"
}

digest() {
    tee /dev/stderr | grep -o "results [0-9a-f]*$"
}

if [ "${1:-}" = run ]; then
    shift
    run "$@"
    exit
fi
[ -d "$base/site" ] || unpack
build
if [ "${1:-}" = build ]; then
    exit
fi
# Not any number of threads, way of storing and address: the code that these vary is the same for all CPU levels.
run -m pytest -p no:cacheprovider tests/test_lanes.py tests/test_accuracy.py
run -m pytest -p no:cacheprovider tests/test_same_bits.py -k any_machine
# By 10,000 calls, as the emulator loses memory with each thread that ends.
for ((start = 0; start < ${CALLS:-20000}; start += 10000)); do
    drawn=(--seed 20 --start "$start" --calls 10000)
    emulated=$(run tests/fuzz.py "${drawn[@]}" | digest)
    here=$("$python" "$tests/fuzz.py" "${drawn[@]}" | digest)
    [ "$emulated" = "$here" ]
    echo "the same results, bit for bit: $here"
done
