#!/bin/sh
# Every table of this folder; what is done is not measured again, so a run that was stopped goes on where it was.
#   sh benchmarks/gpu/run.sh             PYTHON (python3) and OUT (results/gpu) may be set
#   sh benchmarks/gpu/run.sh --tiny      the same path on a CPU; set OUT, too
cd "$(dirname "$0")/../.." || exit 2
: "${PYTHON:=python3}" "${OUT:=results/gpu}"
status=0
run() {
    script=$1 && shift
    "$PYTHON" "benchmarks/gpu/$script.py" --out "$OUT" "$@" || status=1
}
# Both papers' headlines first, some ten minutes: time on a GPU may be short. A tiny run has nothing to put first.
if [ "$*" != --tiny ]; then
    run handoff_ttft --contexts 8192 --transports memory "$@"
    run concurrency --models llama-3-8b --prefixes 5035 --agents 1 15 "$@"
fi
for script in codec_kernels attention_kernels handoff_ttft concurrency; do
    run "$script" "$@"
done
"$PYTHON" -m analysis --results "$OUT" || status=1
exit $status
