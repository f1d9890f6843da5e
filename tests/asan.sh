#!/usr/bin/env bash
# The operators on a build with AddressSanitizer and UndefinedBehaviorSanitizer: every read and
# write outside a tensor, and everything that C++ leaves undefined, ends the run. First from C++, in
# native/operators.cpp, then by the Python tests of operators and metrics. Usage: asan.sh PYTHON
# FOLDER, a folder of its own for the sources and objects, so that neither build disturbs the other.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 folder=$2
mkdir -p "$folder"
rm -rf "$folder"/{csrc,diffad_fast,kernels,tests}
cp -a csrc diffad_fast kernels tests setup.py pyproject.toml README.md LICENSE "$folder"
cd "$folder"
rm -f diffad_fast/*.so
ln -sfn ../kernels diffad_fast/kernels # in place, the package finds them there
export PYTHONPATH=. DIFFAD_FAST_CUDA=0
CXX="${CXX:-c++} -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
    CXXFLAGS="-O1 -g -fno-omit-frame-pointer" "$python" setup.py -q build_ext --inplace
torch=$("$python" -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
${CXX:-c++} -std=c++20 -O0 -g -w -fsanitize=address tests/native/operators.cpp -o operators \
    -isystem "$torch/include" -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch \
    -ltorch_cpu -lc10 -ldl
# PyTorch's own threads and registries live until the end of the process.
ASAN_OPTIONS=detect_leaks=0 ./operators diffad_fast/_C.abi3.so
# Python is not instrumented: the runtime has to be there before it, and what Python keeps until
# the end of the process is no leak of ours. New memory is filled as the tests expect it.
run() {
    LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=254:max_malloc_fill_size=10000000 "$python" "$@"
}
run -c "from diffad_fast import native; assert native.loaded()"
export DIFFAD_TEST_SANITIZER=address,undefined # of the CUDA operators in emulation
run -m pytest -q -n auto --maxprocesses 4 tests/ops tests/test_metrics.py
run -m pytest -q -k emulated tests/diffusion/test_loop.py
