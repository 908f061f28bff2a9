"""Writes testdata/solver/qronos.safetensors: what Brevitas' own Qronos makes of the weight and the two
streams of `solver_golden.py`, on our grids.

Brevitas fits a quantizer of its own whenever it asks for codes; here it is given fixed grids, those of the
weight that least squares ask for, so that the codes can be compared one by one. Statistics, order, damping
and every update of a weight are Brevitas' code, in double precision.

Run: python tests/oracle/qronos_golden.py, with numpy, safetensors, torch and brevitas 0.13.4
"""

import json
from importlib.metadata import version

import numpy as np
import torch
from brevitas.graph.qronos import Qronos
from brevitas.graph.utils import power_iteration
from safetensors.numpy import save_file
from solver_golden import OUT, data, dequantized, fit_rows

FRACTION = 1e-6


class OnFixedGrids(Qronos):
    """Its state, filled from moments instead of from a model's forward passes."""

    def __init__(self, weight, hessian, mixed, grids, case):
        self.layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        self.layer.weight.data = torch.from_numpy(weight.astype(float))
        self.layer.weight_orig = torch.from_numpy(weight.astype(float))
        self.layer.weight_quant = torch.nn.Module()
        self.layer.weight_quant.requires_quant_input = False
        self.name, self.act_order, self.alpha = "layer", case["act_order"], FRACTION
        self.groups, self.columns, self.blocksize = 1, weight.shape[1], 16
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.H, self.G = torch.from_numpy(hessian)[None].clone(), torch.from_numpy(mixed)[None].clone()
        self.grids, self.group = grids, case["group_size"] or weight.shape[1]
        self.codes = np.zeros(weight.shape, np.uint8)

    def get_quant_weights(self, i, i1, permutation_list, with_quant_history=False):
        order = permutation_list[0][:i1 + i] if with_quant_history else permutation_list[0][i1 + i][None]
        columns = [self.rounded(int(column)) for column in order]
        stacked = torch.stack(columns, 1) if columns else torch.zeros(self.codes.shape[0], 0)
        return stacked[None] if with_quant_history else stacked[None, :, 0]

    def rounded(self, column):
        weights = self.layer.weight.data[:, column].numpy()
        grids = self.grids[column // self.group]
        codes = [grid.code(weight) for grid, weight in zip(grids, weights)]
        self.codes[:, column] = codes
        values = [grid.value(code) for grid, code in zip(grids, codes)]
        return torch.tensor(values, dtype=torch.float64)

    def solve(self):
        n_columns = self.codes.shape[1]
        order = torch.argsort(torch.diag(self.H[0]), descending=True) if self.act_order else range(n_columns)
        self.single_layer_update()
        # The columns' final values are on the layer; codes that were asked for on the way may be old.
        for column in order:
            self.rounded(int(column))
        return self.codes


def case(bits, group_size, symmetric, dtype, act_order=True, weighted=True):
    return dict(locals(), method="gptq", clip="none", alpha=1.0, target="qronos", dampening_frac=FRACTION,
                dampening_unit="largest_eigenvalue")


CASES = [
    case(3, 16, False, "f16", weighted=False),
    case(2, 16, False, "bf16", weighted=False),
    case(4, None, True, "f32", weighted=False),
    case(3, 32, True, "bf16"),
]


def main():
    weight, quantized, full, weights = data(np.random.default_rng(11))
    tensors = dict(weight=weight, quantized=quantized, full=full, token_weights=weights)
    for index, setting in enumerate(CASES):
        omega = weights.astype(float) if setting["weighted"] else np.ones(len(weights))
        u, f, w = quantized.astype(float), full.astype(float), weight.astype(float)
        hessian, mixed = u.T * omega @ u, f.T * omega @ u
        damping = FRACTION * float(power_iteration(torch.from_numpy(hessian), 30)) * np.eye(len(hessian))
        target = w @ (mixed + damping) @ np.linalg.inv(hessian + damping)
        group = setting["group_size"] or w.shape[1]
        grids = [fit_rows(target[:, s:s + group], setting) for s in range(0, w.shape[1], group)]
        codes = OnFixedGrids(w, hessian, mixed, grids, setting).solve()
        difference = w - dequantized(codes, grids, group)
        setting["loss"] = float(np.sum(difference @ hessian * difference))
        tensors[f"{index}.codes"] = codes
        of_grids = [np.array([[getattr(grid, name) for grid in row] for row in grids]).T
                    for name in ("scale", "zero")]
        tensors[f"{index}.scales"] = of_grids[0].astype(np.float32).copy()
        tensors[f"{index}.zero_points"] = of_grids[1].astype(np.uint8).copy()
        print(setting)
    versions = {name: version(name) for name in ("numpy", "torch", "brevitas")}
    metadata = dict(cases=json.dumps(CASES), versions=json.dumps(versions))
    save_file(tensors, OUT / "qronos.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
