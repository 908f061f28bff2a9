"""The five tasks of the testbed: pictures on a 6 x 6 grid of 28-pixel cells, and questions on them.

A cell is one token of the model (2 x 2 patches of 14 pixels), so every picture also has one label
per token, which is what the vision tower learns first.

Sources: easy-vqa 1.0 (MIT); Twemoji graphics from emoji-datasource-twitter 16.0.0 (CC-BY 4.0);
DejaVu fonts. Everything else is drawn here.
"""

import json
import os
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GRID = 28, 6
SIDE = CELL * GRID
SOURCES = Path(os.environ.get("TESTBED_SOURCES", "target/testbed/sources"))
EASY_VQA = SOURCES / "easy_vqa" / "data"
TWEMOJI = SOURCES / "package"
FONTS = Path("/usr/share/fonts/truetype/dejavu")

COLOURS = {"red": (214, 40, 40), "green": (34, 150, 60), "blue": (40, 80, 220),
           "yellow": (238, 206, 30), "purple": (140, 50, 170), "orange": (245, 130, 30)}
SHAPES = ["circle", "square", "triangle", "star"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EMOJI = """dog cat mouse rabbit bear lion pig frog bee fish snail turtle apple banana grapes cherries
lemon carrot corn pizza bread egg cake cup key lock bell book clock car bus train rocket bicycle
star sun moon cloud umbrella fire tree house heart ball gift hat""".split()
CODEPOINTS = dict(
    dog="1f436", cat="1f431", mouse="1f42d", rabbit="1f430", bear="1f43b", lion="1f981", pig="1f437",
    frog="1f438", bee="1f41d", fish="1f41f", snail="1f40c", turtle="1f422", apple="1f34e",
    banana="1f34c", grapes="1f347", cherries="1f352", lemon="1f34b", carrot="1f955", corn="1f33d",
    pizza="1f355", bread="1f35e", egg="1f95a", cake="1f382", cup="2615", key="1f511", lock="1f512",
    bell="1f514", book="1f4d6", clock="23f0", car="1f697", bus="1f68c", train="1f686",
    rocket="1f680", bicycle="1f6b2", star="2b50", sun="2600-fe0f", moon="1f319", cloud="2601-fe0f",
    umbrella="2602-fe0f", fire="1f525", tree="1f333", house="1f3e0", heart="2764-fe0f",
    ball="26bd", gift="1f381", hat="1f3a9")
EASY_COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "black": (0, 0, 0),
                "gray": (128, 128, 128), "teal": (0, 128, 128), "brown": (165, 42, 42),
                "yellow": (255, 255, 0)}
EASY_SHAPES = ["circle", "rectangle", "triangle"]

# One label per cell: 0 is nothing; then the tasks' own.
LABELS = ["nothing"]
LABELS += [f"{c} {s}" for c in COLOURS for s in SHAPES]
LABELS += list(LETTERS)
LABELS += [f"{c} bar {part}" for c in COLOURS for part in ("half", "full")]
LABELS += [f"emoji {e}" for e in EMOJI]
LABELS += [f"easy {c} {s}" for c in EASY_COLOURS for s in EASY_SHAPES]
LABEL = {name: i for i, name in enumerate(LABELS)}
IGNORE = -100
TASKS = ["easy_vqa", "reading", "charts", "counting", "emoji"]


@dataclass
class Scene:
    """A picture, its labels per cell, and all the questions that it answers."""
    image: Image.Image
    labels: list
    questions: list  # (category, question, answer)
    bars: dict = field(default_factory=dict)  # cell: (letter, colour, value) of the bar it is part of


def canvas(r):
    """A background that loses red to the right and blue downwards: Qwen2-VL's tower knows relative
    places only, and this lets a patch tell its own."""
    light = [r.randint(244, 255) for _ in range(3)]
    fall = np.linspace(0, 70, SIDE)
    shade = np.empty((SIDE, SIDE, 3))
    shade[..., 0], shade[..., 1], shade[..., 2] = light[0] - fall, light[1], light[2] - fall[:, None]
    image = Image.fromarray(shade.astype(np.uint8))
    return image, ImageDraw.Draw(image), [0] * (GRID * GRID)


def jittered(r, colour):
    return tuple(max(0, min(255, v + r.randint(-14, 14))) for v in colour)


def place(row, col):
    """How a question names a cell. It stands first in the question, always at the same distance from
    the picture: rotary positions are relative, so a place named later is another place to learn."""
    return f"row {row + 1} column {col + 1}"


def plural(word):
    return word + ("es" if word.endswith("s") else "s")


# ---- counting -----------------------------------------------------------------------------------

def draw_shape(draw, r, shape, colour, row, col):
    z = r.uniform(8.5, 12)
    x, y = col * CELL + 14 + r.uniform(-1.5, 1.5), row * CELL + 14 + r.uniform(-1.5, 1.5)
    fill = jittered(r, COLOURS[colour])
    if shape == "circle":
        draw.ellipse((x - z, y - z, x + z, y + z), fill=fill)
    elif shape == "square":
        draw.rectangle((x - z * .9, y - z * .9, x + z * .9, y + z * .9), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - z), (x - z, y + z * .9), (x + z, y + z * .9)], fill=fill)
    else:
        turn = [np.pi * (i / 5 - .5) for i in range(10)]
        draw.polygon([(x + z * 1.15 * (1 if i % 2 == 0 else .45) * np.cos(a),
                       y + z * 1.15 * (1 if i % 2 == 0 else .45) * np.sin(a))
                      for i, a in enumerate(turn)], fill=fill)


def counting(r, held):
    image, draw, labels = canvas(r)
    colours, shapes = r.sample(list(COLOURS), r.randint(2, 4)), r.sample(SHAPES, r.randint(2, 3))
    cells = r.sample(range(GRID * GRID), r.randint(2, 9))
    items = [(r.choice(colours), r.choice(shapes), *divmod(c, GRID)) for c in cells]
    for colour, shape, row, col in items:
        draw_shape(draw, r, shape, colour, row, col)
        labels[row * GRID + col] = LABEL[f"{colour} {shape}"]
    n = lambda f: sum(map(f, items))
    any_colour, any_shape = r.choice(list(COLOURS)), r.choice(SHAPES)
    q = [("count", "how many shapes are there?", str(len(items)))]
    for c in colours + [any_colour]:
        q.append(("count", f"how many {c} shapes are there?", str(n(lambda i: i[0] == c))))
    for s in shapes + [any_shape]:
        q.append(("count", f"how many {plural(s)} are there?", str(n(lambda i: i[1] == s))))
    for c, s in sorted({(i[0], i[1]) for i in items[:3]} | {(any_colour, r.choice(shapes))}):
        q.append(("count both", f"how many {c} {plural(s)} are there?",
                  str(n(lambda i: i[:2] == (c, s)))))
        q.append(("exists", f"is there a {c} {s}?", "yes" if n(lambda i: i[:2] == (c, s)) else "no"))
    c, s = r.choice(colours), r.choice(shapes)
    q.append(("exists", f"is there a {c} {s}?", "yes" if n(lambda i: i[:2] == (c, s)) else "no"))
    a, b = r.sample(colours, 2)
    na, nb = n(lambda i: i[0] == a), n(lambda i: i[0] == b)
    q.append(("compare", f"are there more {a} shapes than {b} shapes?", "yes" if na > nb else "no"))
    q.append(("sum", f"how many shapes are {a} or {b}?", str(na + nb)))
    for colour, shape, row, col in items[:2]:
        q.append(("look", f"{place(row, col)}: what color is it?", colour))
        q.append(("look", f"{place(row, col)}: what shape is it?", shape))
    in_order = sorted(items, key=lambda i: i[2:])
    q.append(("list", "list the shapes.", " ".join(f"{c} {s}" for c, s, _, _ in in_order)))
    row = r.choice(items)[2]
    q.append(("row", f"row {row + 1}: how many shapes are there?", str(n(lambda i: i[2] == row))))
    return Scene(image, labels, q)


# ---- reading ------------------------------------------------------------------------------------

_fonts = {}


def font(name, size):
    if (name, size) not in _fonts:
        _fonts[name, size] = ImageFont.truetype(str(FONTS / name), size)
    return _fonts[name, size]


FACES = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf"]


def draw_letter(draw, r, letter, face, size, fill, row, col):
    f = font(face, size)
    x0, y0, x1, y1 = draw.textbbox((0, 0), letter, font=f)
    x = col * CELL + (CELL - (x1 - x0)) / 2 - x0 + r.uniform(-1, 1)
    y = row * CELL + (CELL - (y1 - y0)) / 2 - y0 + r.uniform(-1, 1)
    draw.text((x, y), letter, font=f, fill=fill)


def letters(r, held, n):
    """A string of n letters; a tenth of all strings is kept for evaluation."""
    while True:
        word = "".join(r.choice(LETTERS) for _ in range(n))
        if (zlib.crc32(word.encode()) % 10 == 0) == held:
            return word


def reading(r, held):
    image, draw, labels = canvas(r)
    rows = sorted(r.sample(range(GRID), r.randint(1, 3)))
    words = []
    for row in rows:
        word = letters(r, held, r.randint(2, 4))
        start = r.randint(0, GRID - len(word))
        face, size = r.choice(FACES), r.randint(20, 25)
        fill = tuple(r.randint(0, 110) for _ in range(3))
        for i, letter in enumerate(word):
            draw_letter(draw, r, letter, face, size, fill, row, start + i)
            labels[row * GRID + start + i] = LABEL[letter]
        words.append(word)
    q = []
    for row, word in zip(rows, words):
        where = f"row {row + 1}"
        q.append(("read", f"{where}: read it.", word))
        q.append(("read", f"{where}: what is written there?", word))
        q.append(("backwards", f"{where}: read it backwards.", word[::-1]))
        q.append(("letter", f"{where}: what is the first letter?", word[0]))
        q.append(("letter", f"{where}: what is the last letter?", word[-1]))
        q.append(("length", f"{where}: how many letters are there?", str(len(word))))
    cells = [(cell, label) for cell, label in enumerate(labels) if label]
    for cell, label in cells[::2]:
        q.append(("look", f"{place(*divmod(cell, GRID))}: what is there?", LABELS[label]))
    q.append(("list", "list the words.", " ".join(words)))
    q.append(("lines", "how many words are there?", str(len(words))))
    q.append(("read top", "read the first word.", words[0]))
    q.append(("read top", "read the last word.", words[-1]))
    every = "".join(words)
    seen, unseen = r.choice(every), r.choice([c for c in LETTERS if c not in every])
    q.append(("exists", f"is there the letter {seen}?", "yes"))
    q.append(("exists", f"is there the letter {unseen}?", "no"))
    word = r.choice(words)
    i = r.randrange(len(word) - 1)
    if every.count(word[i]) == 1:
        q.append(("next", f"which letter comes after {word[i]}?", word[i + 1]))
    return Scene(image, labels, q)


# ---- charts -------------------------------------------------------------------------------------

def charts(r, held):
    image, draw, labels = canvas(r)
    n = r.randint(3, 6)
    cols = sorted(r.sample(range(GRID), n))
    names, colours = r.sample(LETTERS, n), r.sample(list(COLOURS), n)
    values = [r.randint(1, 9) for _ in range(n)]
    while values.count(max(values)) > 1 or values.count(min(values)) > 1:
        values = [r.randint(1, 9) for _ in range(n)]
    bottom, face, bars = 5 * CELL, r.choice(FACES), {}
    for col, name, colour, value in zip(cols, names, colours, values):
        inset = r.uniform(3, 6)
        draw.rectangle((col * CELL + inset, bottom - 14 * value, (col + 1) * CELL - inset, bottom - 1),
                       fill=jittered(r, COLOURS[colour]))
        draw_letter(draw, r, name, face, 20, (20, 20, 20), 5, col)
        labels[5 * GRID + col] = LABEL[name]
        bars[5 * GRID + col] = name, colour, value
        for row in range(5):
            units = min(2, max(0, value - 2 * (4 - row)))
            if units:
                labels[row * GRID + col] = LABEL[f"{colour} bar {('half', 'full')[units - 1]}"]
                bars[row * GRID + col] = name, colour, value
    q = []
    for name, colour, value in zip(names, colours, values):
        q.append(("value", f"what is the value of bar {name}?", str(value)))
        q.append(("value", f"what is the value of the {colour} bar?", str(value)))
        q.append(("look", f"what color is bar {name}?", colour))
        q.append(("look", f"which bar is {colour}?", name))
    for name, col, colour in list(zip(names, cols, colours))[::2]:
        q.append(("look", f"{place(5, col)}: what is there?", name))
        q.append(("look", f"{place(4, col)}: what is there?", colour))
    q.append(("list", "list the bars.", " ".join(f"{n}{v}" for n, v in zip(names, values))))
    top, low = values.index(max(values)), values.index(min(values))
    q += [("extreme", "which bar is the highest?", names[top]),
          ("extreme", "which bar is the lowest?", names[low]),
          ("extreme", "what color is the highest bar?", colours[top]),
          ("extreme", "what color is the lowest bar?", colours[low]),
          ("extreme", "what is the highest value?", str(max(values))),
          ("extreme", "what is the lowest value?", str(min(values))),
          ("count", "how many bars are there?", str(n))]
    for _ in range(2):
        a, b = r.sample(range(n), 2)
        q.append(("compare", f"is bar {names[a]} higher than bar {names[b]}?",
                  "yes" if values[a] > values[b] else "no"))
        high, less = max(values[a], values[b]), min(values[a], values[b])
        q.append(("difference", f"what is the difference of bar {names[a]} and bar {names[b]}?",
                  str(high - less)))
        limit = r.randint(2, 7)
        q.append(("above", f"how many bars are higher than {limit}?",
                  str(sum(v > limit for v in values))))
    return Scene(image, labels, q, bars)


# ---- emoji --------------------------------------------------------------------------------------

_emoji = {}


def emoji_image(name, size):
    if (name, size) not in _emoji:
        path = TWEMOJI / "img/twitter/64" / f"{CODEPOINTS[name]}.png"
        _emoji[name, size] = Image.open(path).convert("RGBA").resize((size, size), Image.BICUBIC)
    return _emoji[name, size]


def emoji(r, held):
    image, _, labels = canvas(r)
    kinds = r.sample(EMOJI, r.randint(2, 6))
    if r.random() < .5:  # neighbours, for questions on what stands beside what
        row, col = r.randrange(GRID), r.randrange(GRID - 2)
        cells = [row * GRID + col + i for i in range(3)]
        rest = [c for c in range(GRID * GRID) if c not in cells]
        cells += r.sample(rest, r.randint(0, 4))
    else:
        cells = r.sample(range(GRID * GRID), r.randint(2, 7))
    grid = {}
    for cell in cells:
        name, size = r.choice(kinds), r.randint(22, 26)
        row, col = divmod(cell, GRID)
        picture = emoji_image(name, size)
        at = (col * CELL + (CELL - size) // 2 + r.randint(-1, 1),
              row * CELL + (CELL - size) // 2 + r.randint(-1, 1))
        image.paste(picture, at, picture)
        labels[cell] = LABEL[f"emoji {name}"]
        grid[row, col] = name
    there = list(grid.values())
    q = []
    for (row, col), name in list(grid.items())[:4]:
        q.append(("look", f"{place(row, col)}: what is there?", name))
        if there.count(name) == 1:
            q.append(("where", f"which row is the {name} in?", str(row + 1)))
            q.append(("where", f"which column is the {name} in?", str(col + 1)))
            for word, step in (("right", 1), ("left", -1)):
                if (row, col + step) in grid:
                    q.append(("beside", f"what is to the {word} of the {name}?",
                              grid[row, col + step]))
    for name in r.sample(sorted(set(there)), min(2, len(set(there)))):
        q.append(("count", f"how many {plural(name)} are there?", str(there.count(name))))
    for name in (r.choice(there), r.choice([e for e in EMOJI if e not in there])):
        q.append(("exists", f"is there a {name}?", "yes" if name in there else "no"))
    q.append(("list", "list the emoji.", " ".join(grid[at] for at in sorted(grid))))
    q.append(("count", "how many emoji are there?", str(len(there))))
    q.append(("kinds", "how many kinds of emoji are there?", str(len(set(there)))))
    return Scene(image, labels, q)


# ---- easy-vqa -----------------------------------------------------------------------------------

def easy_vqa(split):
    """The scenes of a split of easy-vqa, 64 pixels enlarged to 168."""
    asked = {}
    for question, answer, image_id in json.loads((EASY_VQA / split / "questions.json").read_text()):
        asked.setdefault(image_id, []).append((question, answer))
    for image_id, pairs in asked.items():
        image = Image.open(EASY_VQA / split / "images" / f"{image_id}.png").convert("RGB")
        kind = lambda a: "yes/no" if a in ("yes", "no") else "open"
        questions = [(kind(a), q, a) for q, a in pairs]
        yield Scene(image.resize((SIDE, SIDE), Image.BICUBIC), easy_labels(image, pairs), questions)


def easy_labels(image, pairs):
    """Cells that the shape covers by a quarter or more; IGNORE where its kind is not told."""
    pixels = np.asarray(image.resize((96, 96), Image.NEAREST)).astype(int)
    covered = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
    inside = pixels[covered]
    if len(inside) == 0:
        return [0] * (GRID * GRID)
    middle = np.median(inside, 0)
    colour = min(EASY_COLOURS, key=lambda c: np.abs(middle - EASY_COLOURS[c]).sum())
    affirms = lambda q, a: "what" in q or (a == "yes" and " not " not in q and " no " not in q)
    shapes = [s for s in EASY_SHAPES
              if any(a == s or (s in q and affirms(q, a)) for q, a in pairs)]
    label = LABEL[f"easy {colour} {shapes[0]}"] if shapes else IGNORE
    share = covered.reshape(GRID, 16, GRID, 16).mean((1, 3)).reshape(-1)
    return [label if s >= .25 else (0 if s < .05 else IGNORE) for s in share]


MAKERS = dict(reading=reading, charts=charts, counting=counting, emoji=emoji)


def scenes(task, n, seed, held):
    """n scenes of a task; `held` ones never occur in training."""
    if task == "easy_vqa":
        found = list(easy_vqa("test" if held else "train"))
        random.Random(seed).shuffle(found)
        return found[:n]
    r = random.Random(f"{task} {seed} {held}")
    return [MAKERS[task](r, held) for _ in range(n)]
