#!/usr/bin/env bash
# Task weighting (MTM) on one data set: the baseline, every weighting from its best weights, and their comparison:
#
#   launch/mtm.sh mtm_maml data=cifar_fs,way=5,shot=1
#   SEEDS="0 1 2" METHODS="uniform spsa_track" launch/mtm.sh mtm_protonet data=fc100,shot=10 --data_dir=DIR
#
# First the config, then its config string without `method`; every further argument is one of `python -m
# metajax.main`. Workdirs are $RUNS/METHOD-SEED (runs/mtm-<config>-<string> by default), the table and its figure lie
# beside them. Run again, it goes on where it stopped.
set -euo pipefail

if (($# < 2)) || [[ $1 != *mtm_* ]]; then
  echo 'mtm.sh: CONFIG STRING [ARGUMENTS], such as mtm_maml data=cifar_fs,way=5,shot=1' >&2
  exit 2
fi
config=$1 string=$2
shift 2
name=$(basename "$config" .py)
runs=${RUNS:-runs/mtm-${name#mtm_}-$string}
python=${PYTHON:-python}
if [[ $name == *protonet* ]]; then
  first=pretrain methods=${METHODS:-uniform baseline spsa spsa_track backprop inner_first_order look_ahead}
else
  first=baseline
  default='uniform spsa spsa_track spsa_per_class backprop inner_first_order sin spsa_log look_ahead'
  [[ $string =~ data=(cifar_fs|fc100|omniglot) ]] && default+=' spsa_coarse' # these have superclasses
  methods=${METHODS:-$default}
fi

run() { # METHOD SEED [ARGUMENTS]
  local method=$1 seed=$2
  shift 2
  "$python" -m metajax.main --config="$config:$string,method=$method" --workdir="$runs/$method-$seed" \
    --config.seed="$seed" "$@"
  # A run that was told to stop ends well too: the others must not start from half of it.
  [[ -f $runs/$method-$seed/test.json ]] || { echo "mtm.sh: stopped; run again to resume" >&2 && exit 1; }
}

declare -A folders
for seed in ${SEEDS:-0}; do
  run "$first" "$seed" "$@"
  folders[$first]+=${folders[$first]:+,}$runs/$first-$seed
  for method in $methods; do
    [[ $method == "$first" ]] && continue
    start=(--config.init_from="$runs/$first-$seed")
    [[ $method == baseline ]] && start=()
    run "$method" "$seed" "${start[@]}" "$@"
    folders[$method]+=${folders[$method]:+,}$runs/$method-$seed
  done
done

rows=()
# Differences are to the first row: by default as many meta-updates without weighting.
for method in ${methods//$first/} "$first"; do
  rows+=("$method=${folders[$method]}")
done
for argument in "$@"; do
  [[ $argument == --data_dir=* ]] && rows+=("$argument")
done
"$python" -m metajax.compare "${rows[@]}" --markdown="$runs/comparison.md" --csv="$runs/comparison.csv" \
  --figure="$runs/comparison.png"
