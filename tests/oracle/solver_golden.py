"""Writes testdata/solver: a weight, the inputs of its two streams, and what plain numpy in double
precision makes of them with round-to-nearest, GPTQ and GPTAQ.

The factor comes from the textbook chain (invert H, Cholesky of the inverse), the update from the
papers' column loop with lazy blocks, so nothing but the definition is shared with the Rust solver.
The rule of ours that differs from the authors' code: GPTAQ's pull uses the weight before rounding
both within a block and across blocks.

Run: python tests/oracle/solver_golden.py
"""

import json
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

OUT = Path(__file__).resolve().parents[2] / "testdata/solver"
ROWS, COLS, TOKENS = 24, 64, 112
DAMPENING = 0.01


def round_to(value, dtype):
    value = np.float32(value)
    if dtype == "f16":
        return float(np.float16(value))
    if dtype == "bf16":
        bits = value.view(np.uint32).astype(np.uint64)
        bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
        return float((bits & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32))
    return float(value)


class Grid:
    def __init__(self, low, high, case):
        self.top = 2 ** case["bits"] - 1
        if case["symmetric"]:
            self.scale = round_to(max(high, -low) / (self.top / 2), case["dtype"])
            self.zero = (self.top + 1) // 2
        else:
            self.scale = round_to((high - low) / self.top, case["dtype"])
            self.zero = int(np.clip(np.rint(-low / self.scale), 0, self.top))

    def code(self, weights):
        return np.clip(np.rint(weights / self.scale) + self.zero, 0, self.top)

    def value(self, codes):
        return (codes - self.zero) * self.scale


def fit(weights, case):
    low, high = min(weights.min(), 0.0), max(weights.max(), 0.0)
    if case["clip"] == "none":
        return Grid(low, high, case)
    best, least = None, np.inf
    for step in range(80):
        grid = Grid(low * (1 - step / 100), high * (1 - step / 100), case)
        error = (np.abs(grid.value(grid.code(weights)) - weights) ** 2.4).sum()
        if error < least:
            best, least = grid, error
    return best


def fit_rows(weights, case):
    return [fit(row, case) for row in weights]


def solve(weight, hessian, drift, case):
    """Codes in original column order and one grid per row and group."""
    n_cols = weight.shape[1]
    group = case["group_size"] or n_cols
    static = case["method"] == "rtn" or case["act_order"]
    starts = range(0, n_cols, group)
    grids = [fit_rows(weight[:, s:s + group], case) if static else None for s in starts]
    order = np.arange(n_cols)
    factor, pull = np.eye(n_cols), np.zeros((n_cols, n_cols))
    if case["method"] == "gptq":
        if case["act_order"]:
            order = np.argsort(-np.diag(hessian), kind="stable")
        damped = hessian + DAMPENING * np.diag(hessian).mean() * np.eye(n_cols)
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        factor = np.linalg.cholesky(inverse).T
        ordered = drift[np.ix_(order, order)]
        pull = case["alpha"] * np.triu(ordered @ factor.T, 1) @ factor
    work = weight[:, order].copy()
    codes = np.zeros(weight.shape, np.uint8)
    block = group if group < n_cols else 16
    for start in range(0, n_cols, block):
        end = start + block
        if not static and start % group == 0:
            grids[start // group] = fit_rows(work[:, start:start + group], case)
        errors = np.zeros((len(work), block))
        for i in range(start, end):
            row_grids = grids[order[i] // group]
            column = work[:, i].copy()
            for row, grid in enumerate(row_grids):
                codes[row, order[i]] = grid.code(column[row])
                errors[row, i - start] = column[row] - grid.value(float(codes[row, order[i]]))
            errors[:, i - start] /= factor[i, i]
            later = slice(i + 1, end)
            work[:, later] -= np.outer(errors[:, i - start], factor[i, later])
            work[:, later] += np.outer(column, pull[i, later])
        work[:, end:] -= errors @ factor[start:end, end:]
        work[:, end:] += work[:, start:end] @ pull[start:end, end:]
    return codes, grids


def dequantized(codes, grids, group):
    values = np.zeros(codes.shape)
    for index, row_grids in enumerate(grids):
        part = slice(index * group, (index + 1) * group)
        for row, grid in enumerate(row_grids):
            values[row, part] = grid.value(codes[row, part].astype(float))
    return values


def data(rng):
    mixing = rng.standard_normal((COLS, COLS)) / COLS ** 0.5
    spread = np.exp(rng.normal(0, 0.8, COLS))
    full = (rng.standard_normal((TOKENS, COLS)) @ (np.eye(COLS) + 2 * mixing)) * spread
    leak = 0.15 * rng.standard_normal((COLS, COLS)) / COLS ** 0.5
    quantized = full + full @ leak + 0.1 * spread * rng.standard_normal((TOKENS, COLS))
    weight = rng.standard_t(5, (ROWS, COLS)) * 0.05
    weights = rng.lognormal(0, 0.7, TOKENS)
    return [a.astype(np.float32) for a in (weight, quantized, full, weights)]


def case(method, bits, group_size, symmetric, dtype, clip="none", act_order=True, alpha=0.0,
         weighted=True):
    return dict(locals())


CASES = [
    case("rtn", 4, 16, True, "bf16"),
    case("rtn", 3, 32, False, "f16", clip="mse"),
    case("rtn", 2, None, True, "f32", clip="mse"),
    case("gptq", 2, 16, False, "f16"),
    case("gptq", 3, 16, False, "bf16", weighted=False),
    case("gptq", 4, 16, True, "f16"),
    case("gptq", 8, 32, True, "f32"),
    case("gptq", 3, None, False, "f32", act_order=False),
    case("gptq", 3, 16, True, "bf16", act_order=False),
    case("gptq", 2, 16, False, "f16", clip="mse"),
    case("gptq", 2, 16, False, "f16", clip="mse", act_order=False),
    case("gptq", 2, 16, False, "f16", alpha=0.25),
    case("gptq", 3, 32, True, "bf16", alpha=0.25, act_order=False),
    case("gptq", 4, None, False, "f32", alpha=1.0),
    case("gptq", 3, 16, False, "f16", alpha=0.25, weighted=False),
]


def main():
    rng = np.random.default_rng(11)
    weight, quantized, full, weights = data(rng)
    tensors = dict(weight=weight, quantized=quantized, full=full, token_weights=weights)
    moments = {}
    for weighted in (True, False):
        omega = weights.astype(float) if weighted else np.ones(TOKENS)
        u, f = quantized.astype(float), full.astype(float)
        moments[weighted] = (u.T * omega @ u, (f - u).T * omega @ u)
    for index, setting in enumerate(CASES):
        hessian, drift = moments[setting["weighted"]]
        codes, grids = solve(weight.astype(float), hessian, drift, setting)
        group = setting["group_size"] or COLS
        difference = weight - dequantized(codes, grids, group)
        setting["loss"] = float(np.sum(difference @ hessian * difference))
        scales = [[grid.scale for grid in row_grids] for row_grids in grids]
        zeros = [[grid.zero for grid in row_grids] for row_grids in grids]
        tensors[f"{index}.codes"] = codes
        tensors[f"{index}.scales"] = np.array(scales, np.float32).T.copy()
        tensors[f"{index}.zero_points"] = np.array(zeros, np.uint8).T.copy()
    OUT.mkdir(parents=True, exist_ok=True)
    versions = dict(numpy=np.__version__, safetensors=safetensors.__version__)
    metadata = dict(cases=json.dumps(CASES), versions=json.dumps(versions))
    save_file(tensors, OUT / "cases.safetensors", metadata=metadata)
    for setting in CASES:
        print(setting)


if __name__ == "__main__":
    main()
