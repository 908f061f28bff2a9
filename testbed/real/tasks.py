"""Pictures and questions of the real testbed: the tasks of ../data.py, and naming single emoji.

Emoji come from the 32-pixel sheets of emoji-datasource 16.0.0. What Apple, Facebook and Google drew
is for training, Twitter's drawings of the same things are held out.
"""

import json
import os
import random
import sys
from pathlib import Path

from PIL import Image

SIDE = 112
TASKS = ["easy_vqa", "names", "emoji", "counting"]
VENDORS, HELD_VENDOR = ["apple", "facebook", "google"], "twitter"
KINDS = {"Animals & Nature": "nature", "Food & Drink": "food", "Travel & Places": "travel",
         "Activities": "activity", "Objects": "object"}


def generator(cache):
    """The bundled testbed's data.py, with its sources in the cache."""
    os.environ["TESTBED_SOURCES"] = str(cache / "sources")
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import data
    return data


def kind_of(entry):
    """A word for what an emoji shows, as far as its category tells."""
    group = entry["subcategory"].split("-")[0]
    if entry["category"] in ("Animals & Nature", "Travel & Places", "Food & Drink"):
        return {"sky & weather": "sky", "dishware": "tool", "hotel": "place"}.get(group, group)
    return KINDS[entry["category"]]


def named_emoji(cache):
    """Emoji of things that all four vendors drew and whose name has at most two words."""
    for entry in json.loads((cache / "package/emoji.json").read_text()):
        name = entry["short_name"].replace("_", " ").replace("-", " ")
        drawn = all(entry[f"has_img_{v}"] for v in VENDORS + [HELD_VENDOR])
        if drawn and entry["category"] in KINDS and len(name.split()) <= 2 and name.replace(" ", "").isalpha():
            yield name, kind_of(entry), entry["sheet_x"], entry["sheet_y"]


def named_picture(sheet, x, y, r):
    """One emoji on a light ground, nearly filling the picture."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(r.randint(225, 255) for _ in range(3)))
    size = r.randint(84, 104)
    emoji = sheet.crop((34 * x + 1, 34 * y + 1, 34 * x + 33, 34 * y + 33)).resize((size, size), Image.BICUBIC)
    image.paste(emoji, (r.randint(0, SIDE - size), r.randint(0, SIDE - size)), emoji)
    return image


def names(cache, n, seed, held):
    r = random.Random(f"names {seed} {held}")
    vendors = [HELD_VENDOR] if held else VENDORS
    sheets = {v: Image.open(cache / f"package/img/{v}/sheets/32.png").convert("RGBA") for v in vendors}
    every = [(entry, v) for entry in named_emoji(cache) for v in vendors]
    r.shuffle(every)
    for (name, kind, x, y), vendor in every[:n]:
        yield named_picture(sheets[vendor], x, y, r), [
            ("name", "what is this?", name), ("kind", "what kind of thing is this?", kind)], [name] * 36


def scenes(cache, task, n, seed, held):
    """Lists of (picture of 112 pixels, questions as (kind, question, answer), what each cell of a
    6 x 6 grid shows, or None where that is not known)."""
    if task == "names":
        return list(names(cache, n, seed, held))
    data = generator(cache)
    small = lambda image: image.convert("RGB").resize((SIDE, SIDE), Image.BICUBIC)
    word = lambda i: None if i < 0 else data.LABELS[i].replace("emoji ", "").replace("easy ", "")
    return [(small(s.image), [q for q in s.questions if q[0] != "list"], [word(i) for i in s.labels])
            for s in data.scenes(task, n, seed, held)]
