#!/bin/bash
# Makes the Python environment DIR that the tests compare with, if it is not there.
# Usage: environment.sh DIR
set -euo pipefail
oracle=$1
cd "$(dirname "$0")/../.."
[ ! -x "$oracle/bin/pytest" ] || exit 0
recipe=../shared/oracle/make_oracle.sh
if [ ! -x "$oracle/bin/python" ]; then
  if [ -f "$recipe" ]; then
    bash "$recipe" "$oracle" 2.15.0
  else
    python3 -m venv "$oracle"
    "$oracle/bin/pip" install -q torch==2.15.0 torchvision \
      --index-url https://download.pytorch.org/whl/cpu
  fi
fi
"$oracle/bin/pip" install -q -r tests/oracle/requirements.txt
