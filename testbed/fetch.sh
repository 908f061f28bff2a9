#!/bin/bash
# Fetches the sources of the testbed's pictures from the package registries.
# Usage: fetch.sh FOLDER
set -euo pipefail
mkdir -p "$1"
cd "$1"
[ -d easy_vqa ] || { pip download -q --no-deps easy-vqa==1.0 && unzip -q easy_vqa-*.whl; }
[ -d package/img ] || { npm pack -s emoji-datasource-twitter@16.0.0 \
  && tar xzf emoji-datasource-twitter-16.0.0.tgz package/emoji.json package/LICENSE package/img/twitter/64; }
