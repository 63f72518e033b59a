#!/bin/sh
# Every table of this folder, one after the other; what is done is not measured again. Options go to each script.
#   sh benchmarks/gpu/run.sh             PYTHON (python3) and OUT (results/gpu) may be set
#   sh benchmarks/gpu/run.sh --tiny      the same path on a CPU; set OUT, too
cd "$(dirname "$0")/../.." || exit 2
: "${PYTHON:=python3}" "${OUT:=results/gpu}"
status=0
for script in codec_kernels attention_kernels concurrency handoff_ttft; do
    "$PYTHON" "benchmarks/gpu/$script.py" --out "$OUT" "$@" || status=1
done
"$PYTHON" -m analysis --results "$OUT" || status=1
exit $status
