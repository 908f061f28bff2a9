"""Writes testdata/gguf/blocks.json: random blocks of every quantized type that is written, and the
weights that the `gguf` package makes of them, as bits of float32.

    python gguf_golden.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

OUTPUT = Path(__file__).resolve().parents[2] / "testdata/gguf/blocks.json"
SEED, N_BLOCKS = 0, 2
# Where a block has numbers in half precision: any bits there might be NaN.
HALVES = dict(Q4_0=[0], Q4_1=[0, 2], Q8_0=[0], Q2_K=[80, 82], Q3_K=[108])


def main():
    random = np.random.default_rng(SEED)
    golden = dict(gguf=version("gguf"), seed=SEED, types={})
    for name, places in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (N_BLOCKS, n_bytes), dtype=np.uint8)
        for place in places:
            halves = (random.standard_normal((N_BLOCKS, 1)) * 0.1).astype("<f2")
            blocks[:, place:place + 2] = halves.view(np.uint8)
        weights = gguf.quants.dequantize(blocks, kind).astype("<f4")
        golden["types"][name] = dict(blocks=blocks.tobytes().hex(), bits=weights.view("<u4").ravel().tolist())
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
