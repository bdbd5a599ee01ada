#!/usr/bin/env bash
# Runs the compiled CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds an instrumented
# extension in a temporary folder and runs the attention tests of the `cpu` backend over it, for every instruction
# set that this processor has, and then the hostile calls of tests/hostile. Any report fails the run.
#
#   tests/sanitize.sh            all cases
#   tests/sanitize.sh --short    a selection, two to three minutes on two cores
#
# Needs gcc or clang with their sanitizers' libraries, setuptools, pybind11 and what the tests need. PYTHON names
# the interpreter, CC the compiler.
set -euo pipefail

python=${PYTHON:-python}
cases="cpu or test_gemv or test_capture" hostile=4000
case "${1:-}" in
  "") ;;
  --short)
    hostile=500
    cases="cpu and (head_dim or window or strides or empty) and not longformer and not -float64- and not -float16-"
    cases="($cases) or ((test_gemv or test_capture) and not bfloat16 and not float64)" ;;
  *) echo "usage: $0 [--short]" >&2; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r "$root/led_kernels" "$root/led_model" "$root/tests" "$root/csrc" "$root/setup.py" "$root/pyproject.toml" "$work"
rm -f "$work"/led_kernels/_C*.so "$work"/led_kernels/_build_error.txt
cd "$work"
# setuptools reads the version from led_kernels, but nothing else of the project's metadata is needed
touch README.md LICENSE
LED_KERNELS_SANITIZE=address,undefined LED_KERNELS_REQUIRE_EXT=1 \
  "$python" setup.py -q build_ext --inplace

compiler=${CC:-gcc}
preload=$("$compiler" -print-file-name=libasan.so)
if [[ $preload != /* ]]; then  # clang names its library otherwise
  preload=$("$compiler" -print-file-name=libclang_rt.asan-"$(uname -m)".so)
fi

# with the C++ library, or AddressSanitizer, which comes first, does not find what throws
export LD_PRELOAD="$preload $("$compiler" -print-file-name=libstdc++.so.6)"
# Python and torch leave memory to the end of the process, which is no concern of the kernels;
# what is too large is an error of theirs, as without the sanitizer
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
isas=$("$python" -c "import torch; from led_kernels import _C; print(*_C.cpu_isas())")
pids=()
for isa in $isas; do
  # uncaptured, as a report is written to the process's own stderr just before it ends
  LED_KERNELS_CPU_ISA=$isa "$python" -m pytest tests/kernels/test_attention.py tests/kernels/test_gemv.py tests/kernels/test_capture.py tests/kernels/test_properties.py -q -k "$cases" \
    --capture=no -p no:faulthandler -p no:cacheprovider >"$work/$isa.log" 2>&1 &
  pids+=($!)
done
failed=0
for isa in $isas; do
  wait "${pids[0]}" || failed=1
  pids=("${pids[@]:1}")
  echo "== $isa =="
  cat "$work/$isa.log"
done
echo "== hostile calls =="
if ! "$python" -m tests.hostile calls --cases "$hostile"; then
  failed=1
fi
exit $failed
