"""What the scripts that ask an engine share: a folder's linears as the engine groups them, and whether
their tensors fit the parameters that it makes.

Engines run the query, key and value of an attention as one linear, and the gate with the way up; a group
is one such linear, by the engine's name, with the parts of the checkpoint that it is made of.
"""

import json
import logging
import re
from pathlib import Path

from safetensors import safe_open

IN_DECODER = re.compile(r".*\.layers\.\d+\.(self_attn|mlp)\.[a-z_]+_proj$")
# Parameters that the parts of a whole have in common.
SHARED = ("weight_shape", "g_idx")


class Operations:
    """Compiled operations: none, and what asks whether one supports something hears that it does not."""

    def __getattr__(self, name):
        if "support" not in name:
            raise AttributeError(name)
        return lambda *_: False


def fits(layer, parts):
    """Loads tensors into a layer's parameters by their own loaders; what went wrong."""
    problems, seen = [], set()
    for suffix, shard, tensor in parts:
        param = dict(layer.named_parameters()).get(suffix)
        if param is None:
            problems.append(f"{suffix}: no such parameter")
            continue
        seen.add(suffix)
        both_float = param.dtype.is_floating_point and tensor.dtype.is_floating_point
        if param.dtype != tensor.dtype and not both_float:
            problems.append(f"{suffix}: {tensor.dtype} for {param.dtype}")
        try:
            param.weight_loader(param, tensor, *([] if shard is None else [shard]))
        except Exception as e:
            problems.append(f"{suffix} {shard}: {type(e).__name__} {tuple(tensor.shape)} {e}")
        taken = sum(t.numel() for s, _, t in parts if s == suffix)
        if suffix not in SHARED and taken != param.numel():
            problems.append(f"{suffix}: {taken} numbers for {param.numel()}")
    absent = {name for name, _ in layer.named_parameters()} - seen
    return problems + [f"{name}: no tensor for it" for name in sorted(absent)]


def tensors_of(folder):
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


class Group:
    """One linear of an engine, and what a checkpoint has for it."""

    def __init__(self):
        self.parts, self.cols = [], None

    def shape(self):
        """`[cols, rows]`, of all parts together."""
        rows = cols = 0
        for suffix, _, tensor in self.parts:
            if suffix == "weight_shape":
                cols, rows = int(tensor[1]), rows + int(tensor[0])
            elif suffix == "scales":
                cols, rows = self.cols, rows + tensor.shape[1]
            elif suffix == "weight":
                cols, rows = tensor.shape[1], rows + tensor.shape[0]
        return cols, rows

    @property
    def bias(self):
        return any(suffix == "bias" for suffix, _, _ in self.parts)


def groups_of(folder, find, decoder):
    """The decoder's linears by name, and the names of other linears. `find` gives a tensor's place in the
    engine and its shard, or nothing if the engine drops it."""
    groups, plain = {}, []
    for name, tensor in tensors_of(folder):
        found = find(name)
        if not found:
            continue
        place, suffix = found[0].rsplit(".", 1)
        if place.startswith(decoder) and IN_DECODER.match(place):
            group = groups.setdefault(place, Group())
            group.parts.append((suffix, found[1], tensor))
            group.cols = group.cols or columns(folder, name)
        elif tensor.ndim == 2 and suffix == "weight" and "embed" not in place and "norm" not in place:
            plain.append(place)
    return groups, plain


def columns(folder, name):
    """Inputs of a linear, by the configuration."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    if name.rsplit(".", 2)[1] == "down_proj":
        return text["intermediate_size"]
    if name.rsplit(".", 2)[1] == "o_proj":
        heads = text["num_attention_heads"]
        return heads * (text.get("head_dim") or text["hidden_size"] // heads)
    return text["hidden_size"]


def answer_all(describe, questions):
    """Prints what `describe` says of each folder, or why the engine refuses it."""
    answers = {}
    for question in questions:
        asked, folder = question.split(":", 1)
        try:
            answers[question] = describe(Path(folder), asked or None)
        except Exception as e:
            logging.exception(question)
            answers[question] = {"refused": f"{type(e).__name__}: {e}"}
    print("ANSWER" + json.dumps(answers))
