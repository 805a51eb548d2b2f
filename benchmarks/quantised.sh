#!/usr/bin/env bash
# What adapters on quantised bases cost on one GPU, and whether they learn as PEFT's QLoRA does.
#
#   bash benchmarks/quantised.sh table decode large            # some of the parts below; `all` of them
#   MODEL=path/to/SmolLM2-135M-Instruct DATA=findings.jsonl bash benchmarks/quantised.sh curve
#
# Run in a checkout whose package is installed (`.[test]`), on an NVIDIA GPU of 80 GB that does nothing else. Models
# have random weights, but for the curve's, which `theodora demo` leaves behind with its rows; nothing is downloaded.
#
# OUT: a folder for results and figure, instead of benchmarks/results and docs/images. COMMIT: noted in the results
# where this is no checkout. UNSLOTH: a folder to import Unsloth from. Each part has a time limit and begins no variant
# shortly before it; the minutes beside the parts are what is expected of one H200. What one process compiled serves
# the next (--keep-caches), so `first step s` is not that of a first start.
set -u
cd "$(dirname "$0")/.."
FIGURES=${OUT:-docs/images}
OUT=${OUT:-benchmarks/results}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=""

step() { # limit in seconds, results file, options of train_step.py
  local limit=$1 file=$2
  shift 2
  timeout "$limit" python benchmarks/train_step.py --keep-caches ${COMMIT:+--commit "$COMMIT"} \
    --seconds "$((limit * 3 / 4))" --output "$OUT/$file" "$@"
}

# 2 minutes. 8 layers of Llama-3-8B's shape on NF4, 4 x 2048 tokens, plain and checkpointed, against both floors.
table() {
  step 200 quantised_step.json --quantize nf4 --sweep checkpointing --rounds 5 \
    --variants floor floor-eager dora lora peft-lora-bf16 peft-dora-bf16
}
# 1 minute. Decoding one token with an unmerged adapter, against the NF4 base alone.
decode() {
  timeout 110 python benchmarks/decode.py --quantize nf4 --variants base lora dora --batches 1 --modes graph static \
    --output "$OUT/quantised_decode.json"
}
# 2 minutes. 70B's shape, 1 x 2048 tokens, checkpointed, within 80 GiB.
large() {
  step 150 quantised_step.json --quantize nf4 --hidden 8192 --layers 80 --batch 1 --gradient-checkpointing \
    --memory-limit 80 --variants floor-eager dora lora --rounds 2 --steps 1
}
# 1 minute. What fits into 24 GiB with AdamW's step: 8B plain and checkpointed, 14B checkpointed.
memory() {
  step 100 quantised_step.json --quantize nf4 --sweep memory --memory-limit 24 --rounds 2 --steps 1
}
# 2 minutes. PEFT as it comes, with float32 adapters.
peers() {
  step 150 quantised_peers.json --quantize nf4 --sweep checkpointing --rounds 3 \
    --variants floor-eager dora peft-lora peft-dora
}
# 4 minutes. Unsloth, plain and checkpointed.
unsloth() {
  local variants=(--quantize nf4 --variants floor-eager dora unsloth-lora unsloth-dora --rounds 3)
  [ -n "${UNSLOTH:-}" ] && variants+=(--unsloth-path "$UNSLOTH")
  step 240 quantised_unsloth.json "${variants[@]}" &&
    step 240 quantised_unsloth.json "${variants[@]}" --gradient-checkpointing
}
# 3 minutes. The other kinds, each against a floor of its own.
others() {
  local kind bad=0
  for kind in int8 int4 fp8; do
    step 120 quantised_step.json --quantize "$kind" --variants floor floor-eager dora lora --rounds 3 || bad=1
  done
  return $bad
}
# 4 minutes with 16 cores. 300 real steps, 15 runs at once: PEFT's QLoRA, our LoRA and DoRA, 5 seeds each.
curve() {
  timeout 420 python benchmarks/quantised_curve.py --model "${MODEL:?the folder of SmolLM2-135M-Instruct}" \
    --data "${DATA:?a file of rows}" --seeds 5 --parallel 15 --output "$OUT/quantised_curve.json" \
    --figure "$FIGURES/quantised_curve.png"
}

ALL="table decode large memory peers unsloth others curve"
[ "$*" = all ] && set -- $ALL
for part in "${@:-table}"; do
  case " $ALL " in *" $part "*) ;; *) echo "$part is none of: $ALL" >&2; exit 2 ;; esac
done
for part in "${@:-table}"; do
  echo "== $part, $(date +%T)"
  "$part" || failed="$failed $part"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
