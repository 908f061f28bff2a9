"""Writes testdata/solver: GPTQ and GPTAQ of a small layer by an implementation of its own, in
numpy and f64, with the published chain of factors (Cholesky, inverse, Cholesky of the inverse).

Run: python tests/oracle/solver_golden.py
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

OUT = Path(__file__).resolve().parents[2] / "testdata/solver"
ROWS, COLS, TOKENS, DAMPENING = 24, 48, 120, 0.01
# Symmetric grids only where they are fitted before the loop: a fitted one has its largest weight
# half a step beyond its last code, a tie that the last bit of f32 decides.
CASES = [dict(bits=b, group=g, symmetric=s, act_order=a, alpha=alpha)
         for b, g, s, a, alpha in [
             (4, 16, False, True, 0.0), (4, 16, False, False, 0.0), (3, 48, False, True, 0.0),
             (3, 16, True, True, 0.25), (2, 16, False, True, 0.0), (2, 16, False, True, 0.25),
             (2, 48, False, False, 0.25), (3, 8, False, False, 0.0)]]


def grid(w, case):
    """Scale and zero of the columns that share them, from rows of weights."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    top = 2 ** case["bits"] - 1
    if case["symmetric"]:
        scale = np.float32(2 * np.maximum(high, -low) / top).astype(np.float64)
        return scale, np.full(len(w), (top + 1) // 2)
    scale = np.float32((high - low) / top).astype(np.float64)
    return scale, np.clip(np.rint(-low / scale), 0, top)


def gptq(w, h, c, case, block=16):
    top, group = 2 ** case["bits"] - 1, case["group"]
    order = np.arange(COLS)
    static = {}
    if case["act_order"]:
        order = np.argsort(-np.diag(h), kind="stable")
        for g in range(COLS // group):
            static[g] = grid(w[:, g * group:(g + 1) * group], case)
    w, h, c = w[:, order].copy(), h[order][:, order].copy(), c[order][:, order]
    h += np.eye(COLS) * DAMPENING * np.diag(h).mean()
    lower = np.linalg.cholesky(h)
    inverse = np.linalg.inv(lower).T @ np.linalg.inv(lower)
    upper = np.linalg.cholesky(inverse).T
    drift = case["alpha"] * np.triu(c @ upper.T, 1) @ upper
    codes = np.zeros((ROWS, COLS))
    for start in range(0, COLS, block):
        end = min(start + block, COLS)
        errors, before = np.zeros((ROWS, end - start)), np.zeros((ROWS, end - start))
        for i in range(start, end):
            if not case["act_order"] and i % group == 0:
                # All corrections so far, those of this block too, before the grid is fitted.
                full = w.copy()
                full[:, end:] += (-errors @ upper[start:end, end:] + before @ drift[start:end, end:])
                current = grid(full[:, i:i + group], case)
            scale, zero = static[order[i] // group] if case["act_order"] else current
            codes[:, i] = np.clip(np.rint(w[:, i] / scale) + zero, 0, top)
            error = (w[:, i] - (codes[:, i] - zero) * scale) / upper[i, i]
            errors[:, i - start], before[:, i - start] = error, w[:, i]
            w[:, i + 1:end] += (-np.outer(error, upper[i, i + 1:end])
                                + np.outer(w[:, i], drift[i, i + 1:end]))
            w[:, i] = (codes[:, i] - zero) * scale
        w[:, end:] += -errors @ upper[start:end, end:] + before @ drift[start:end, end:]
    back = np.argsort(order)
    return w[:, back], np.ascontiguousarray(codes[:, back].astype(np.uint8))


def main():
    rng = np.random.default_rng(11)
    single = lambda x: x.astype(np.float32)
    w = single(rng.normal(size=(ROWS, COLS)))
    mix = rng.normal(size=(COLS, COLS)) * 0.3 + np.diag(rng.uniform(0.3, 2, COLS))
    u = single(rng.normal(size=(TOKENS, COLS)) @ mix)
    f = single(u + 0.1 * rng.normal(size=u.shape) @ mix)
    weights = single(rng.gamma(0.7, size=TOKENS))
    wide = u.astype(np.float64)
    h = (wide * weights[:, None]).T @ wide
    c = ((f.astype(np.float64) - wide) * weights[:, None]).T @ wide
    tensors = dict(w=w, u=u, f=f, token_weights=weights)
    for i, case in enumerate(CASES):
        q, codes = gptq(w.astype(np.float64), h, c, case)
        difference = w - q
        case["loss"] = float(np.einsum("ri,ij,rj->", difference, h, difference))
        tensors[f"codes.{i}"] = codes
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT / "layer.safetensors", metadata={
        "numpy": np.__version__, "script": "tests/oracle/solver_golden.py"})
    (OUT / "cases.json").write_text(json.dumps(CASES, indent=1) + "\n")


if __name__ == "__main__":
    main()
