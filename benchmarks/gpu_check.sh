#!/usr/bin/env bash
# Build with CUDA, gpu tests, compute-sanitizer, gpu suite: `make gpu-check`, in under 10 minutes, with
# the Python that has torch and without network. Leaves one JSON and one Markdown file, and the
# plots, in the folder $1. Each part runs even if one before it failed; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu-check}
python=${PYTHON:-python3}
export PYTHONPATH=. DIFFAD_FAST_CUDA=1

if ! arch=$("$python" -c "
import torch
if not torch.cuda.is_available():
    raise SystemExit(f'torch {torch.__version__} sees no CUDA device')
print('%d.%d' % torch.cuda.get_device_capability())"); then
    echo "gpu-check: FAILED: no GPU to check (PYTHON=$python; nvidia-smi tells about the driver)" >&2
    exit 1
fi

rm -rf "$out"
mkdir -p "$out"
summary=()
status=0
# part NAME SECONDS COMMAND...: 124 is the status of a command that timeout ended.
part() {
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    echo "== gpu-check: $name" >&2
    timeout "$limit" "$@" || code=$?
    case $code in
        0) verdict=passed ;;
        124) verdict="FAILED: not done after $limit s" ;;
        *) verdict="FAILED with exit status $code" ;;
    esac
    [ "$code" = 0 ] || status=1
    summary+=("| $name | $verdict | $((SECONDS - began)) s |")
}

# Installed, the package finds the Triton kernels in its own folder; in place it needs a link.
if [ ! -e diffad_fast/kernels ]; then
    ln -s ../kernels diffad_fast/kernels
    trap 'rm -f diffad_fast/kernels' EXIT
fi
part "build for sm_${arch/./}" 120 env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" \
    "$python" setup.py -q build_ext --inplace
tests=$(grep -rlE "mark\.gpu" tests)
part "gpu tests" 80 "$python" -m pytest -q -m gpu $tests
# The extension's kernels: those of the operators and of the loop, which the Triton ones are not.
# Fewer tokens: the tools run a kernel up to a hundred times slower.
own=(tests/ops tests/diffusion)
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "compute-sanitizer $tool" 80 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest -q -m gpu -x "${own[@]}" -k "not 70000"
    done
else
    summary+=("| compute-sanitizer | FAILED: not installed | |")
    status=1
fi
part "gpu suite" 220 "$python" -m benchmarks gpu --quick --out "$out"

report=$(ls "$out"/*.md 2> /dev/null | head -1)
report=${report:-$out/gpu-check.md}
{
    printf '\n## gpu-check\n\n| part | result | time |\n| --- | --- | --- |\n'
    printf '%s\n' "${summary[@]}"
} >> "$report"
tail -n "$((${#summary[@]} + 4))" "$report"
[ "$status" = 0 ] || echo "gpu-check: FAILED, see above and $report" >&2
exit "$status"
