# Sourced by the scripts beside it: where things are, what every comparison starts from, and runs side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
PY=${PY:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2}
JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}  # (nproc would heed OMP_NUM_THREADS)
W=data/moving_shapes
LOGS=runs/logs
mkdir -p $LOGS docs/results

$PY embedded_world/moving_shapes.py

# Reads lines "name command..."; each is one process, $JOBS of them at a time, its output in $LOGS/name.log.
side_by_side() {
  xargs -P "$JOBS" -d '\n' -I{} sh -c 'set -- {}; name=$1; shift
    "$@" >'"$LOGS"'/$name.log 2>&1 || echo "$name failed: see '"$LOGS"'/$name.log"'
}

# The SFT start of seed $1, as plumbing/embedded.py has it, and the same start trained on for as many steps as RL gets.
FEW="--data $W/train.json --num_clips 40"
SFT="$($PY -c 'from plumbing.embedded import POLICY_SFT; print(POLICY_SFT)')"
sft_start() { echo "policy_s$1 $PY sft.py --name policy $FEW $SFT --seed $1 --resume"; }
sft_continued() {
  echo "continued_s$1 $PY sft.py --name continued $FEW --batch_size 16 --model runs/sft/policy_s$1/final" \
    "--steps 150 --lr 3e-4 --seed $1 --resume"
}
