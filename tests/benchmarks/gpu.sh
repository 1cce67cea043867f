#!/bin/sh
# Everything that needs an NVIDIA GPU; run from the repository with phi3-lora installed.
#   tests/benchmarks/gpu.sh tests           the laws and the conformance suite on the GPU
#   tests/benchmarks/gpu.sh bench [NAME..]  Phi-3-mini's shape with random weights, against peers
set -eu
PYTHON=${PYTHON:-python3}
MODEL=${MODEL:-/tmp/phi3-mini-random}
# TF32 would hide a difference behind its own 1e-3.
export MLX_ENABLE_TF32=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
case ${1:-} in
tests)
  shift
  exec "$PYTHON" -m pytest -q -m gpu tests/gpu tests/backends "$@"
  ;;
bench)
  shift
  test -f "$MODEL/model.safetensors" || "$PYTHON" tests/benchmarks/random_model.py "$MODEL" mini
  [ $# -gt 0 ] || set -- ours-cuda ours-cuda-compiled plain-torch trl-default trl-tuned
  exec "$PYTHON" tests/benchmarks/steps.py "$@" --model "$MODEL" --device gpu --dtype bfloat16 \
    --documents "${DOCUMENTS:-32}" --steps "${STEPS:-10}"
  ;;
*)
  sed -n '2,4s/^# *//p' "$0"
  exit 2
  ;;
esac
