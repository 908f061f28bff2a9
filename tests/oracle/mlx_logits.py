"""Logits of a folder in mlx-vlm, in a process of its own: importing it changes transformers.

Usage: mlx_logits.py FOLDER INPUTS.npz LOGITS.npz
INPUTS has input_ids, pixel_values and image_grid_thw; LOGITS gets logits and the number of quantized
linears.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.utils import load_model


def main():
    folder, inputs, output = map(Path, sys.argv[1:])
    model = load_model(folder)
    kinds = [type(module).__name__ for _, module in model.named_modules()]
    arrays = {name: mx.array(value) for name, value in np.load(inputs).items()}
    answer = model(arrays["input_ids"], arrays["pixel_values"], mask=None,
                   image_grid_thw=arrays["image_grid_thw"])
    np.savez(output, logits=np.array(answer.logits.astype(mx.float32))[0],
             n_quantized=kinds.count("QuantizedLinear"))


if __name__ == "__main__":
    main()
