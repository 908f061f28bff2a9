"""AWQ on one decoder layer, written from its description (arXiv:2306.00978 §3.2 and the search that
its authors published) on top of transformers' modules; the grid is the one that vlmq writes."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

N_RATIOS = 20
Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def write_samples(folder, n=3):
    """A few conversations with an image each, together fewer tokens than are ever left out."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    rows = []
    for i in range(n):
        pixels = rng.integers(0, 256, (70, 60 + 20 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": f"<image>\nhow many shapes are in row {i}?"},
            {"from": "gpt", "value": "three, and two of them are red"}]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read_samples(folder, processor):
    """The samples as transformers prepares them, in the file's order."""
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        human, gpt = (turn["value"] for turn in row["conversations"])
        chat = [{"role": "user", "content": [
                    {"type": "image"},
                    {"type": "text", "text": human.removeprefix("<image>\n")}]},
                {"role": "assistant", "content": gpt}]
        text = processor.apply_chat_template(chat)
        yield processor(text=[text], images=[Image.open(folder / row["image"])],
                        return_tensors="pt")


def load(folder):
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    return processor, model


def rounded(weight, bits, group):
    """Each group to nearest, on the grid from its least to its greatest value and zero."""
    parts = weight.reshape(-1, group)
    low, high = parts.amin(1, keepdim=True).clamp(max=0), parts.amax(1, keepdim=True).clamp(min=0)
    top = 2 ** bits - 1
    scale = (high - low) / top
    scale[scale == 0] = 1
    zero = (-low / scale).round().clamp(0, top)
    codes = ((parts / scale).round() + zero).clamp(0, top)
    return ((codes - zero) * scale).reshape(weight.shape)


class Layer:
    """A layer with what each of its linears read, sample by sample."""

    def __init__(self, layer, inputs, arguments, bits, group):
        self.layer, self.inputs, self.arguments = layer, inputs, arguments
        self.bits, self.group = bits, group

    def weight(self, name):
        return self.layer.get_submodule(name).weight

    def scales(self, name, ratio):
        mean = torch.cat(self.inputs[name]).abs().mean(0)
        scales = mean.pow(ratio).clamp(min=1e-4)
        return scales / (scales.max() * scales.min()).sqrt()

    def outputs(self, name):
        """Of the module that is judged where the linear `name` is scaled."""
        if name == Q:
            return [self.layer.self_attn(x[None], **arguments)[0][0]
                    for x, arguments in zip(self.inputs[name], self.arguments)]
        module = self.layer.mlp if name == GATE else self.layer.get_submodule(name)
        return [module(x) for x in self.inputs[name]]

    def losses(self, names):
        before = torch.cat(self.outputs(names[0]))
        kept = {name: self.weight(name).data.clone() for name in names}
        losses = []
        for step in range(N_RATIOS):
            scales = self.scales(names[0], step / N_RATIOS)
            for name in names:
                found = rounded(kept[name] * scales, self.bits, self.group) / scales
                self.weight(name).data = found
            losses.append((torch.cat(self.outputs(names[0])) - before).square().mean().item())
        for name in names:
            self.weight(name).data = kept[name]
        return losses

    def limited(self, weight, inputs):
        """Row by row and group by group the limit of least output error."""
        rows, cols = weight.shape
        parts = weight.reshape(rows, cols // self.group, self.group)
        x = inputs.reshape(len(inputs), cols // self.group, self.group)
        most = parts.abs().amax(-1, keepdim=True)
        best, least = most.clone(), torch.full_like(most, float("inf"))
        for step in range(10):
            limit = most * (1 - step / 20)
            cut = parts.clamp(-limit, limit)
            error = rounded(cut.reshape(rows, cols), self.bits, self.group).reshape(parts.shape)
            error = torch.einsum("tgc,rgc->trg", x, error - parts).square().mean(0)[..., None]
            better = error < least
            best[better], least[better] = limit[better], error[better]
        return parts.clamp(-best, best).reshape(rows, cols)


def layers(model, samples, bits, group):
    """Every decoder layer with the inputs that it has in full precision."""
    found = []
    handles = []
    for module in model.model.language_model.layers:
        inputs = {name: [] for name in (Q, K, V, O, GATE, UP, DOWN)}
        arguments = []
        for name, kept in inputs.items():
            handles.append(module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0][0].clone())))

        def keep(_, args, kwargs, arguments=arguments):
            wanted = ("attention_mask", "position_embeddings", "position_ids")
            arguments.append({key: kwargs[key] for key in wanted if key in kwargs})
        handles.append(module.self_attn.register_forward_pre_hook(keep, with_kwargs=True))
        found.append(Layer(module, inputs, arguments, bits, group))
    n_tokens = 0
    for sample in samples:
        n_tokens += sample["input_ids"].shape[1]
        model(**sample)
    for handle in handles:
        handle.remove()
    return found, n_tokens


GROUPS = [[Q, K, V], [O], [GATE, UP], [DOWN]]
