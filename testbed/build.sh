#!/bin/bash
# A testbed from nothing: sources, training, export, gates. About an hour and a half on two cores.
# Run with an environment that has testbed/requirements.txt.
# Usage: build.sh [WORK] [SEED] [OUT]; OUT gets model/, calibration/ and eval/.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
work=$(realpath -m "${1:-$here/../target/testbed}")
seed=${2:-0}
out=$(realpath -m "${3:-$here}")
mkdir -p "$work"
cd "$here"
export TESTBED_SOURCES=$work/sources
./fetch.sh "$TESTBED_SOURCES"
python train.py tower "$work" --seed "$seed" --images 4000 --steps 3500 --mix .2,.15,.35,.15,.15
python train.py features "$work" --seed "$seed" --images 4000

decoder() { python train.py decoder "$work" --seed "$seed" --batch 12 --every 250 "$@"; }
# Lists first; then what a single answer in a crowd of others teaches too slowly, by itself: things
# found by their names, and counts; then everything, the rate falling.
decoder --steps 950 --constant --mix .08,.26,.28,.22,.16
decoder --steps 400 --constant --init "$work/trained" --lists 0 --mix .02,.12,.6,.12,.14 \
  --focus charts/value,charts/look,emoji/where,emoji/exists,reading/exists
decoder --steps 800 --constant --init "$work/trained" --lists .15 --mix .05,.24,.36,.21,.14
decoder --steps 400 --constant --init "$work/trained" --lists 0 --mix .03,.12,.15,.55,.15 \
  --focus "counting/count,counting/count both,counting/sum,counting/row,emoji/where,emoji/count"
decoder --steps 2300 --init "$work/trained" --lists .1 --mix .05,.2,.24,.36,.15

python export.py "$work" --out "$out"
python gates.py --testbed "$out"
