"""How large the largest activations of the language model in CACHE/model are, layer by layer, on held-out text.

Usage: activations.py CACHE [N]; write_text.py comes first. N texts of each file, 8 if absent.

Prints, for the residual stream after each layer, the median and the largest absolute value over all tokens and
channels, their ratio, the channel of the largest, and how often it stands at the first token of its text; and
the share of attention that goes to the first token, mean over heads and over tokens from the eighth on.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration


def texts(cache, n):
    for path in sorted((cache / "text/heldout").glob("*.jsonl")):
        yield from (json.loads(line)["text"] for line in path.read_text().splitlines()[:n])


@torch.no_grad()
def read(cache, n):
    """Residual streams [text][layer][token, channel], and attention to the first token [text][layer]."""
    folder = cache / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    states, sinks = [], []
    for text in texts(cache, n):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        decoder = model.model.language_model
        # The last entry of hidden_states has the final norm in it; a hook sees the layer's own output.
        last = []
        hook = decoder.layers[-1].register_forward_hook(lambda _, __, out: last.append(
            out[0] if isinstance(out, tuple) else out))
        out = decoder(input_ids=ids, output_hidden_states=True, output_attentions=True)
        hook.remove()
        states.append([h.reshape(ids.shape[1], -1).float() for h in (*out.hidden_states[1:-1], last[0])])
        sinks.append([a[0, :, 8:, 0].float().mean().item() for a in out.attentions])
    return states, sinks


def main():
    cache, n = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8
    states, sinks = read(cache, n)
    print("| layer | median | largest | ratio | channel | at the first token | attention to it |\n" + "|---" * 7 + "|")
    for layer in range(len(states[0])):
        of_texts = [text[layer].abs() for text in states]
        peaks = [divmod(h.argmax().item(), h.shape[1]) for h in of_texts]
        median = torch.cat([h.flatten() for h in of_texts]).median().item()
        largest = max(of_texts, key=lambda h: h.max().item())
        channel = largest.argmax().item() % largest.shape[1]
        first = sum(token == 0 for token, _ in peaks)
        sink = sum(text[layer] for text in sinks) / len(sinks)
        print(f"| {layer} | {median:.3f} | {largest.max():.1f} | {largest.max() / median:.0f} | {channel} "
              f"| {first} of {len(peaks)} | {100 * sink:.0f} % |")


if __name__ == "__main__":
    main()
