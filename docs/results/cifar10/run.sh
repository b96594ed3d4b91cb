#!/usr/bin/env bash
# The paper's experiment in small: every method with every seed, pretrained, probed and analysed.
# usage: run.sh DATA OUT [EPOCHS] [METHODS] [SEEDS]    DATA holds CIFAR-10's train.tar and test.tar
# METHODS are recipes: small_simmim small small_famt small_mae small_mae_amt small_mae_famt ...
# Two runs at a time, a core each. Killed or stopped, the same command goes on where it was.
set -euo pipefail
data=$1 out=$2 epochs=${3:-2} methods=${4:-"small_simmim small small_mean"} seeds=${5:-"0 1 2"}
export OMP_NUM_THREADS=1 data out epochs
mkdir -p "$out"
for split in train test; do
    kamim shards build "$data/$split.tar" "$out/shards/$split" --detector fast,frequency \
        --crop 96 --frame 128
done

one() {
    set -e
    run="$out/$1-seed-$2"
    [ -f "$run/probe/probe.json" ] && return
    kamim pretrain "$out/shards/train" --recipe "$1" --seed "$2" --epochs "$epochs" --batch 128 \
        --workers 1 --check size --log-every 65 --save-every 195 --resume auto --out "$run" >> "$run.log" 2>&1
    kamim probe "$run" "$out/shards/train" "$out/shards/test" --out "$run/probe" >> "$run.log" 2>&1
    echo "$(date +%T) $1 seed $2: $(tail -1 "$run.log")"
}
export -f one
for seed in $seeds; do for method in $methods; do echo "$method $seed"; done; done |
    xargs -P 2 -L 1 bash -ec 'one $0 $1'

runs=("$out"/*-seed-[0-9])  # those of earlier calls into the same folder too
kamim probe random:small "$out/shards/train" "$out/shards/test" --out "$out/random"
kamim analyse "${runs[@]}" random:small "$out/shards/test" --out "$out/analysis" --images 128
