#!/bin/bash
# Everything in testbed/ from nothing: sources, training, export, checks. About two hours on two
# cores. Run from the repository's root with an environment that has testbed/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")"
work=${1:-../target/testbed}
export TESTBED_SOURCES=$work/sources
./fetch.sh "$TESTBED_SOURCES"
python train.py tower "$work" --minutes 7 --images 4000
python train.py features "$work" --images 5000
python train.py decoder "$work" --minutes 90 --batch 8 --every 8
python export.py "$work"
python gates.py
