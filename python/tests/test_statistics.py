"""What a calibration pass sums up, held against transformers' activations and the laws."""

import numpy as np
import pytest
import torch
import vlmq
from conftest import CALIBRATION, MODEL
from transformers import AutoModelForImageTextToText

TEXTS = [{"text": text} for text in ["how many red shapes are there in the image?",
                                     "what is the color of the circle?",
                                     "two plus three is five, and one is left."]]


def test_hessians_are_those_of_the_inputs_that_transformers_sees():
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    seen = {}
    modules = dict(model.named_modules())
    name = next(name for name in modules if name.endswith("layers.0.self_attn.q_proj"))
    modules[name].register_forward_hook(
        lambda _, inputs, __: seen.setdefault("u", []).append(inputs[0][0].double()))
    with vlmq.statistics(MODEL, TEXTS, layers=[0], method="gptq") as groups:
        samples = groups.samples
        group = next(groups)
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor(sample.input_ids.astype(np.int64))[None])
    u = torch.cat(seen["u"])
    expected = (u.T @ u).numpy()
    assert group.n_tokens == len(u) == group.effective_sample_size
    assert group.weights is None and group.factors is None and group.cross is None
    assert group.hessian.dtype == np.float32
    difference = np.abs(group.hessian - expected).max() / np.abs(expected).max()
    assert difference < 1e-5, difference
    assert all(set(sample.classes) <= {"text", "special"} for sample in samples)


def test_weights_and_factors_keep_the_laws(rows):
    with vlmq.statistics(MODEL, rows[:6], method="vlmq-v1", bits=2, group_size=64) as groups:
        samples = groups.samples
        found = list(groups)
    modules = [name for group in found for name in group.modules]
    assert len(modules) == len(set(modules)) == 28
    assert [group.layer for group in found] == sorted(group.layer for group in found)
    n_tokens = sum(len(sample.input_ids) for sample in samples)
    assert all(len(sample.classes) == len(sample.input_ids) for sample in samples)
    assert "vision" in samples[0].classes and "answer" in samples[0].classes
    weighted = [group for group in found if group.weights is not None]
    assert {group.layer for group in weighted} == {1, 2, 3}
    for group in found:
        h = group.hessian
        assert h.shape[0] == h.shape[1] and np.array_equal(h, h.T)
        assert np.linalg.eigvalsh(h.astype(np.float64)).min() > -1e-4 * np.trace(h)
        assert group.n_tokens == n_tokens
    for group in weighted:
        assert [len(w) for w in group.weights] == [len(sample.input_ids) for sample in samples]
        omega = np.concatenate(group.weights).astype(np.float64)
        g = np.concatenate(group.factors).astype(np.float64)
        assert np.allclose(omega, g / g.mean(), rtol=1e-4)
        ess = omega.sum() ** 2 / (omega**2).sum()
        assert np.isclose(ess, group.effective_sample_size, rtol=1e-4)


def test_drift_is_summed_up_at_the_input_or_the_output(rows):
    with vlmq.statistics(MODEL, rows[:2], layers=[1], method="gptaq", bits=3) as groups:
        for group in groups:
            assert group.cross.shape == group.hessian.shape and group.output_cross is None
    with vlmq.statistics(MODEL, rows[:2], layers=[1], bits=3) as groups:
        found = {group.modules[0].rsplit(".", 1)[-1]: group for group in groups}
    down = found["down_proj"]
    assert down.cross is None and down.output_cross.shape == (256, 768)
    assert np.isfinite(down.output_cross).all() and np.abs(down.output_cross).max() > 0


def test_a_pass_ends_after_the_last_layer_that_is_asked_for(rows):
    groups = vlmq.statistics(MODEL, rows[:2], layers=[1], bits=3)
    assert {group.layer for group in groups} == {1}
    assert next(groups, None) is None
    groups.close()


def test_a_pass_can_be_left(rows):
    with vlmq.statistics(MODEL, rows[:4]) as groups:
        next(groups)
    groups = vlmq.statistics(MODEL, CALIBRATION, samples=4)
    next(groups)
    del groups


def test_what_cannot_be_is_an_error(rows):
    with pytest.raises(vlmq.Error, match="layers: 9"):
        next(vlmq.statistics(MODEL, rows[:2], layers=[9]))
    with pytest.raises(vlmq.Error, match="keeps no statistics"):
        next(vlmq.statistics(MODEL, rows[:2], method="rtn"))
    with pytest.raises(vlmq.Error):
        vlmq.statistics(MODEL, rows[:2], bits=7)
    with pytest.raises(vlmq.Error, match="no-such"):
        vlmq.statistics("no-such", rows[:2]).samples
