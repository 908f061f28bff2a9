#!/bin/bash
# Everything in testbed/ from nothing: sources, training, export, checks. About two hours on two
# cores. Run with an environment that has testbed/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")"
work=${1:-../target/testbed}
seed=${2:-0}
export TESTBED_SOURCES=$work/sources
./fetch.sh "$TESTBED_SOURCES"
python train.py tower "$work" --seed "$seed" --images 4000 --minutes 15 --mix .2,.15,.35,.15,.15
python train.py features "$work" --seed "$seed" --images 4000

decoder() { python train.py decoder "$work" --seed "$seed" --batch 12 --every 5 "$@"; }
# Lists first; then what a single answer in a crowd of others teaches too slowly, by itself: things
# found by their names, and counts; then everything, the rate falling.
decoder --minutes 12 --constant --mix .08,.26,.28,.22,.16
decoder --minutes 5 --constant --init "$work/trained" --lists 0 --mix .02,.12,.6,.12,.14 \
  --focus charts/value,charts/look,emoji/where,emoji/exists,reading/exists
decoder --minutes 10 --constant --init "$work/trained" --lists .15 --mix .05,.24,.36,.21,.14
decoder --minutes 5 --constant --init "$work/trained" --lists 0 --mix .03,.12,.15,.55,.15 \
  --focus "counting/count,counting/count both,counting/sum,counting/row,emoji/where,emoji/count"
decoder --minutes 30 --init "$work/trained" --lists .1 --mix .05,.2,.24,.36,.15

python export.py "$work"
python gates.py
