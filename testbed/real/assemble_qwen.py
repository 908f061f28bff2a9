"""Puts Qwen2.5-Coder-0.5B-Instruct into the LLaVA form of assemble.py, to be measured as a text model.

Usage: assemble_qwen.py CACHE; fetch_qwen.sh comes first. Writes CACHE/model.

The tower is assemble.py's; the projector is drawn from seed 0 and not trained, so pictures mean nothing
to this model.
"""

import argparse
from pathlib import Path

from assemble import Language, gguf_model, write_model


def language_model(cache):
    model, tokenizer = gguf_model(cache / "qwen", "model.gguf")
    ids = dict(bos_token_id=151643, eos_token_id=151645, pad_token_id=151643)
    return Language(model, tokenizer, ids, unused="<|image_pad|>", image="<|image_pad|>", tied=False)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    args = p.parse_args()
    write_model(args.cache, language_model(args.cache))


if __name__ == "__main__":
    main()
