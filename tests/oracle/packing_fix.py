"""A fixture for tests that load asymmetric folders."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor


@pytest.fixture(scope="module", autouse=True)
def packed_zero_points_on_meta():
    """compressed-tensors up to 0.20 packs zero points, but forgets to on the meta device, where
    transformers prepares a model: every asymmetric folder, its own too, then fails to load with a
    size mismatch. Here the shapes of its real packing are given to the prepared model."""
    original = PackedQuantizationCompressor.compress

    def compress(state_dict, scheme):
        out = original(state_dict, scheme)
        zero_point = out.get("weight_zero_point")
        if zero_point is not None and zero_point.device.type == "meta":
            rows = -(-zero_point.shape[0] * scheme.weights.num_bits // 32)
            shape = (rows, *zero_point.shape[1:])
            out["weight_zero_point"] = torch.empty(shape, dtype=torch.int32, device="meta")
        return out

    PackedQuantizationCompressor.compress = staticmethod(compress)
    yield
    PackedQuantizationCompressor.compress = original
