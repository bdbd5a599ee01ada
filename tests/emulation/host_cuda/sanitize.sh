#!/usr/bin/env bash
# Runs the CUDA kernels, compiled by g++ behind the shim, under AddressSanitizer and UndefinedBehaviorSanitizer: builds
# an instrumented module and runs this folder's tests over it, but for those of planted faults. Any report fails the
# run.
#
#   tests/emulation/host_cuda/sanitize.sh            all cases
#   tests/emulation/host_cuda/sanitize.sh --short    a selection
#
# Needs gcc with its sanitizers' libraries, pybind11 and what the tests need. PYTHON names the interpreter, CXX the
# compiler.
set -euo pipefail

python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/../../.." && pwd)
folder=tests/emulation/host_cuda
# AddressSanitizer itself ends the process at the stores outside of shared memory that test_harness provokes
cases="not store_behind"
case "${1:-}" in
  "") ;;
  --short) cases="$cases and (test_harness or head_dim or padding or packed or alignment or many_globals)" ;;
  *) echo "usage: $0 [--short]" >&2; exit 2 ;;
esac

cd "$root"
export LED_KERNELS_SANITIZE=address,undefined
LED_HOST_CUDA_MODULE=$("$python" -c "from tests.emulation.host_cuda.build import build_module, build_toys
build_toys()
print(build_module())")
export LED_HOST_CUDA_MODULE

LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"
export LD_PRELOAD
# Python and torch leave memory to the end of the process, which is no concern of the kernels
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# uncaptured, as a report is written to the process's own stderr just before it ends
"$python" -m pytest $folder --ignore $folder/test_mutations.py -k "$cases" -q --capture=no -p no:faulthandler -p no:cacheprovider
