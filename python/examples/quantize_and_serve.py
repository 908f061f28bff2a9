"""From a model of transformers to a folder that vLLM serves.

Usage: python quantize_and_serve.py [MODEL] [FOLDER] [ROWS.parquet]

MODEL is a name on the hub or a folder; FOLDER is where everything goes. The rows have an image, a question
and its answer each; without them ChartQA's training rows are taken from the hub.
"""

import sys
from pathlib import Path

import datasets
import transformers
import vlmq

name, folder, *data = [*sys.argv[1:], *["Qwen/Qwen2.5-VL-3B-Instruct", "vlmq-example"][len(sys.argv) - 1:]]
original, quantized = Path(folder, "original"), Path(folder, "3bit")

# %% The model and its processor, as transformers has them, in a folder.
model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
model.save_pretrained(original)
transformers.AutoProcessor.from_pretrained(name).save_pretrained(original)
del model

# %% Rows to calibrate on, and others to measure by.
if data:
    rows = datasets.Dataset.from_parquet(data[0])
else:
    rows = datasets.load_dataset("HuggingFaceM4/ChartQA", split="train[:400]")
    rows = rows.rename_columns({"query": "question", "label": "answer"})
middle = len(rows) // 2
calibration, held_out = rows.select(range(middle)), rows.select(range(middle, len(rows)))

# %% What it would cost.
arguments = dict(calibration=calibration, bits=3, group_size=64, symmetric=True)
cost = vlmq.plan(original, **arguments)
print(f"{cost['n_modules']} linears, {cost['n_tokens']} tokens, "
      f"{cost['peak_memory_bytes'] / 1e9:.1f} GB of memory at most")

# %% Quantize. If it is stopped, the same call goes on.
found = vlmq.quantize(original, quantized, report=True, progress=True, **arguments)
print(f"{found['tensor_bytes'] / 1e6:.0f} MB, see {quantized / 'report.html'}")

# %% How much was lost, on questions that nothing was chosen by.
scores = vlmq.evaluate(quantized, {"held-out": held_out}, reference=original, progress=True)
task = scores["tasks"]["held-out"]
low, high = task["score"]["interval"]
print(f"{task['score']['percent']:.1f} % right ({low:.1f} to {high:.1f}), "
      f"KL {task['kl_per_answer_token']:.4f} per answer token, {len(task['flipped'])} questions flipped")

# %% Whether the folder is what its readers expect.
problems = vlmq.verify(quantized, against=original)["verification"]["problems"]
assert not problems, problems

# %% Which tokens counted, in the second layer.
with vlmq.statistics(original, calibration, layers=[1], bits=3, group_size=64) as groups:
    classes = groups.samples[0].classes
    for group in groups:
        if group.weights is not None:
            weights = group.weights[0]
            vision = sum(w for w, c in zip(weights, classes) if c == "vision")
            print(f"{', '.join(m.rsplit('.', 1)[-1] for m in group.modules)}: vision tokens hold "
                  f"{100 * vision / weights.sum():.0f} % of the first sample's weight")

# %% Serve it.
print(f"vllm serve {quantized} --max-model-len 8192")
