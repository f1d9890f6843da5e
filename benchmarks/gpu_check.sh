#!/usr/bin/env bash
# Build with CUDA, gpu tests, compute-sanitizer, gpu suite: `make gpu-check`, in under 10 minutes, with
# the Python that has torch and without network. Leaves one JSON and one Markdown file, the plots,
# and a log of each part in the folder $1, and all of them in its all.tar.gz. Each part runs even if
# one before it failed; the exit status tells. SKIP_BUILD=1: the library is there already.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu-check}
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} DIFFAD_FAST_CUDA=1

if ! arch=$("$python" -c "
import torch
if not torch.cuda.is_available():
    raise SystemExit(f'torch {torch.__version__} sees no CUDA device')
print('%d.%d' % torch.cuda.get_device_capability())"); then
    echo "gpu-check: FAILED: no GPU to check (PYTHON=$python; nvidia-smi tells about the driver)" >&2
    exit 1
fi

rm -rf "$out"
mkdir -p "$out/logs"
# part NAME SECONDS COMMAND...: 124 is the status of a command that timeout ended; `unfinished`,
# where it is set, the verdict then.
part() {
    local name=$1 limit=$2 began=$SECONDS code=0 log="$out/logs/${1// /-}"
    shift 2
    echo "== gpu-check: $name" >&2
    timeout -s INT -k 20 "$limit" "$@" > "$log.log" 2>&1 || code=$?
    case $code in
        0) verdict=passed ;;
        124) verdict="${unfinished:-FAILED: not done} after $limit s" ;;
        *) verdict="FAILED with exit status $code" ;;
    esac
    [ "$code" = 0 ] || tail -n 40 "$log.log" >&2
    echo "| $name | $verdict | $((SECONDS - began)) s |" > "$log.row"
}

# Installed, the package finds the Triton kernels in its own folder; in place it needs a link.
if [ ! -e diffad_fast/kernels ]; then
    ln -s ../kernels diffad_fast/kernels
    trap 'rm -f diffad_fast/kernels' EXIT
fi
if [ -z "${SKIP_BUILD:-}" ]; then
    part "1 build for sm_${arch/./}" 150 \
        env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" \
        "$python" setup.py -q build_ext --inplace
fi
# What only looks for errors runs side by side: compiling and sanitizing keep several cores busy.
workers=()
"$python" -c "import xdist" 2> /dev/null && workers=(-n 6 --dist worksteal)
# Tests of a GPU: by their mark, or by a fixture of conftest.py whose devices are one of these.
of_gpus='mark\.gpu|def test.*[(, ](cuda|compiled|fused)[,)]'
{
    began=$SECONDS
    part "2 gpu tests" 150 env OMP_NUM_THREADS=2 "$python" -m pytest -q -m gpu "${workers[@]}" \
        $(grep -rlE "$of_gpus" tests --include='test_*.py') -k "not times_on_a_gpu"
    # Those of the Triton kernels, which elsewhere an interpreter runs: as many as there is time for.
    left=$((150 - (SECONDS - began)))
    [ "$left" -lt 20 ] || unfinished="no failure" part "2 tests of kernels" "$left" \
        env OMP_NUM_THREADS=2 "$python" -m pytest -q -x -m "not gpu and not slow" \
        "${workers[@]}" tests/kernels
} &
# The extension's kernels, in namespace diffad, and neither PyTorch's nor Triton's: the tools run one
# up to a hundred times slower. Fewer tokens for the same reason.
for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
        # Of the memory that kernels touch: failing calls of the driver are pytest's to see.
        part "3 compute-sanitizer $tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --kernel-name kns=diffad \
            $([ "$tool" = memcheck ] && echo --report-api-errors no) \
            "$python" -m pytest -q -m gpu -x -k "not 70000" \
            $(grep -rlE "$of_gpus" tests/ops tests/diffusion --include='test_*.py') &
    else
        echo "| compute-sanitizer $tool | FAILED: not installed | |" \
            > "$out/logs/3-compute-sanitizer-$tool.row"
    fi
done
wait
part "4 clock" 60 "$python" -m pytest -q -m gpu tests/benchmarks/test_counting.py -k times_on_a_gpu
# The cases that goals are set for. Those of whole detectors apart: of their contenders some compile
# a network, for as long as there is time.
goals='token_mlp_loop|anomaly_map three|(q_sample|ddim_step).* 512'
goals+='|norm_silu (4|16|5) groups.*last(, modulated)?(, forward and backward|, launched.*)?$'
goals+='|attention level 1, .*bf16|dwt2d haar.*256×256|haar_(un)?pack level [123], .*(×3×256|last)|_packet'
goals+='|ddim_finish'
part "5 gpu suite" 160 "$python" -m benchmarks gpu --seconds 0.3 --compile-seconds 60 \
    --filter "$goals" --out "$out"
part "6 detectors" 140 "$python" -m benchmarks gpu --seconds 0.3 \
    --filter 'detector.score (unet-small|audio)' --out "$out/detectors"

report=$(ls "$out"/*.md 2> /dev/null | head -1)
report=${report:-$out/gpu-check.md}
{
    printf '\n## gpu-check\n\n| part | result | time |\n| --- | --- | --- |\n'
    cat "$out"/logs/*.row
} >> "$report"
(cd "$out" && tar -czf all.tar.gz -- *)
tail -n 8 "$report"
if grep -q FAILED "$out"/logs/*.row; then
    echo "gpu-check: FAILED, see above and $report" >&2
    exit 1
fi
