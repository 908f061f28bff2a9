"""Tokens a second of vlmq and of transformers, in turns, on the same prompt, image and threads.

Usage: generation.py MODEL IMAGE PROGRAM [--prompts 1,8,32] [--tokens 33] [--rounds 5] [--threads 2]

PROGRAM is the example generation_speed. Both compute in float32; every answer has exactly so many tokens.
Rates are of the tokens after the first, so that reading the prompt is left out; medians over rounds, and
the median of the ratios of neighbouring runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("image")
parser.add_argument("program")
parser.add_argument("--prompts", default="1,8,32")
parser.add_argument("--tokens", type=int, default=33)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
os.environ |= dict(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1")

import torch  # noqa: E402: threads are told by the environment
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

torch.set_num_threads(args.threads)
processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
message = dict(role="user", content=[dict(type="image"), dict(
    type="text", text="Describe this image in every detail.")])
prompt = processor.apply_chat_template([message], add_generation_prompt=True)
image = Image.open(args.image).convert("RGB")


def transformers(n_prompts):
    inputs = processor(text=[prompt] * n_prompts, images=[image] * n_prompts, return_tensors="pt")

    def seconds(n):
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, max_new_tokens=n, min_new_tokens=n)
        return time.perf_counter() - begin

    seconds(2)
    first, all_of_it = seconds(1), seconds(args.tokens)
    return n_prompts * (args.tokens - 1) / (all_of_it - first), first


def vlmq(n_prompts):
    command = [args.program, args.model, args.image, n_prompts, args.tokens, args.threads]
    # What the program sets for itself before it begins.
    environment = os.environ | dict(CANDLE_NUM_THREADS="1", RAYON_NUM_THREADS=str(args.threads))
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True,
                          env=environment)
    told = json.loads(done.stdout)
    return told["tokens_per_second"], told["first_token_seconds"]


print("| prompts at once | vlmq, tokens/s | transformers, tokens/s | ratio | first token, s | transformers, s |")
print("|---|---|---|---|---|---|")
for n in map(int, args.prompts.split(",")):
    pairs = [(vlmq(n), transformers(n)) for _ in range(args.rounds)]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    middle = [statistics.median(run[part] for run in runs) for part in (0, 1) for runs in (ours, theirs)]
    ratio = statistics.median(a[0] / b[0] for a, b in pairs)
    print(f"| {n} | {middle[0]:.1f} | {middle[1]:.1f} | {ratio:.2f} | {middle[2]:.2f} | {middle[3]:.2f} |", flush=True)
