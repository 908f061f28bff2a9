"""Writes testdata/processor: what Pillow and transformers make of generated inputs.

Run with an environment that has transformers, torch, torchvision and Pillow:
    python tests/oracle/processor_golden.py
"""
import io, json, os, pathlib, platform, shutil, struct, sys, tempfile, zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import PIL
import tokenizers
import transformers
from PIL import Image, ImageOps, PngImagePlugin
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

OUT = pathlib.Path(__file__).resolve().parents[2] / "testdata" / "processor"
VERSIONS = dict(transformers=transformers.__version__, pillow=PIL.__version__, numpy=np.__version__,
                tokenizers=tokenizers.__version__, python=platform.python_version(),
                script="tests/oracle/processor_golden.py")


def crc(data):
    return zlib.crc32(bytes(data))


def lcg(width, height):
    """Byte i is the top byte of state i of s <- 1664525 s + 1013904223 mod 2^32."""
    state, out = (width << 16 | height) & 0xFFFFFFFF, bytearray()
    for _ in range(width * height * 3):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return Image.frombytes("RGB", (width, height), bytes(out))


def write(name, value, **kw):
    (OUT / name).write_text(json.dumps(dict(versions=VERSIONS, **value), ensure_ascii=False, **kw) + "\n")


def resize_golden():
    pairs = [((w, h), to) for (w, h), to in [
        ((1, 1), (28, 28)), ((1, 7), (5, 3)), ((7, 1), (3, 5)), ((2, 2), (3, 3)), ((3, 5), (5, 3)), ((5, 5), (5, 9)),
        ((9, 9), (4, 9)), ((16, 16), (8, 8)), ((17, 13), (28, 28)), ((28, 28), (28, 28)), ((31, 57), (56, 28)),
        ((40, 30), (84, 56)), ((64, 48), (28, 56)), ((64, 64), (63, 65)), ((99, 101), (56, 56)), ((100, 3), (28, 28)),
        ((3, 100), (56, 28)), ((120, 90), (112, 84)), ((127, 31), (140, 28)), ((150, 40), (84, 28)), ((168, 168), (84, 84)),
        ((200, 1), (56, 28)), ((1, 200), (28, 84)), ((213, 107), (196, 112)), ((256, 192), (252, 196)), ((333, 77), (56, 112)),
        ((30, 80), (20, 60)), ((30, 80), (20, 59)), ((60, 200), (56, 28)), ((90, 91), (56, 28))]]
    cases = []
    for frm, to in pairs:
        for f in (3,) if frm[0] > 40 else (1, 2, 3, 4, 5):
            cases.append({"filter": f, "from": frm, "to": to, "crc32": crc(lcg(*frm).resize(to, f).tobytes())})
    for f in (1, 2, 4, 5):
        cases.append({"filter": f, "from": (150, 40), "to": (84, 112), "crc32": crc(lcg(150, 40).resize((84, 112), f).tobytes())})
    write("resize.json", dict(cases=cases))


SETTINGS = [
    dict(image_processor_type="Qwen2VLImageProcessor", min_pixels=28224, max_pixels=28224,
         size=dict(shortest_edge=28224, longest_edge=28224)),
    dict(image_processor_type="Qwen2VLImageProcessor", size=dict(shortest_edge=3136, longest_edge=50176)),
    dict(image_processor_type="Qwen2VLImageProcessor", size=dict(shortest_edge=3136, longest_edge=20000), patch_size=16,
         merge_size=2, temporal_patch_size=2, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], resample=2),
    dict(image_processor_type="Qwen2VLImageProcessor", size=dict(shortest_edge=784, longest_edge=30000), patch_size=14,
         merge_size=1, temporal_patch_size=3, do_normalize=False),
]


def pixel_golden():
    cases = []
    sizes = [(1, 1), (28, 28), (56, 56), (57, 55), (168, 168), (13, 200), (200, 13), (400, 2), (42, 70), (97, 31), (224, 168),
             (250, 333)]
    for i, settings in enumerate(SETTINGS):
        p = Qwen2VLImageProcessorPil(**{k: v for k, v in settings.items() if k != "image_processor_type"})
        for w, h in sizes if i < 2 else sizes[3:8]:
            out = p(images=[lcg(w, h)], return_tensors="np")
            px = np.ascontiguousarray(out["pixel_values"]).astype("<f4", copy=False)
            assert out["pixel_values"].dtype == np.float32
            cases.append(dict(settings=i, size=(w, h), grid_thw=out["image_grid_thw"][0].tolist(), crc32=crc(px.tobytes()),
                              head=[float(x) for x in px.ravel()[:4]]))
    rng, sr = np.random.default_rng(7), []
    while len(sr) < 240:
        h, w = (int(x) for x in np.exp(rng.uniform(0, 8.5, 2)))
        f, lo, hi = [(28, 3136, 1003520), (28, 28224, 28224), (32, 65536, 16777216), (28, 4 * 784, 16384 * 784)][len(sr) % 4]
        if max(h, w) / min(h, w) <= 200:
            sr.append([h, w, f, lo, hi, *smart_resize(h, w, f, lo, hi)])
    for h, w in [(14, 14), (42, 42), (70, 98), (126, 1), (1, 126), (14, 2800)]:   # halves: round to even
        sr.append([h, w, 28, 784, 1003520, *smart_resize(h, w, 28, 784, 1003520)])
    write("pixel_values.json", dict(settings=SETTINGS, cases=cases, smart_resize=sr))


def png(width, height, depth, color, rows, extra=()):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(k, d) for k, d in extra)
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows))) + chunk(b"IEND", b""))


def image_golden():
    folder = OUT / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rgb = lcg(11, 7)
    gray = rgb.convert("L")
    alpha = lcg(7, 11).convert("L").resize((11, 7))
    rgba = rgb.copy(); rgba.putalpha(alpha)
    la = gray.copy(); la.putalpha(alpha)
    pal = rgb.quantize(16)
    files = {}

    def save(name, image, **kw):
        image.save(folder / name, **kw)
        files[name] = None

    save("rgb.png", rgb); save("gray.png", gray); save("rgba.png", rgba); save("la.png", la)
    save("palette.png", pal); save("palette_transparent.png", pal, transparency=3)
    save("palette_alpha.png", pal, transparency=bytes([0, 40, 80, 120, 160, 200, 255]))
    save("palette_4.png", rgb.quantize(4), bits=2); save("palette_2.png", rgb.quantize(2), bits=1)
    save("gray_transparent.png", gray, transparency=17); save("rgb_transparent.png", rgb, transparency=rgb.getpixel((0, 0)))
    save("bilevel.png", gray.point(lambda v: 255 * (v > 127)).convert("1"))
    save("rgb.bmp", rgb); save("palette.bmp", pal); save("gray.bmp", gray); save("bilevel.bmp", gray.convert("1")); save("rgba.bmp", rgba)
    save("rgb.tiff", rgb); save("gray.tiff", gray); save("rgba.tiff", rgba, compression="tiff_lzw")
    save("palette.gif", pal); save("palette_transparent.gif", pal, transparency=3); save("gray.gif", gray)
    save("rgb_lossless.webp", rgb, lossless=True); save("rgba_lossless.webp", rgba, lossless=True, exact=True)
    r16 = np.array([[(x * 9001 + y * 777) % 65536 for x in range(11)] for y in range(7)], ">u2")
    r16[0, :6] = [0, 1, 254, 255, 256, 65535]
    r16x = lambda n: np.stack([(r16.astype(np.uint32) * (i + 1) + 99 * i) % 65536 for i in range(n)], -1).astype(">u2")
    for name, color, n, extra in [("gray16.png", 0, 1, ()), ("la16.png", 4, 2, ()), ("rgb16.png", 2, 3, ()), ("rgba16.png", 6, 4, ()),
                                  ("gray16_transparent.png", 0, 1, [(b"tRNS", struct.pack(">H", 256))]),
                                  ("rgb16_transparent.png", 2, 3, [(b"tRNS", struct.pack(">HHH", 1, 2, 3))])]:
        (folder / name).write_bytes(png(11, 7, 16, color, [row.tobytes() for row in r16x(n)], extra)); files[name] = None
    for bits in (1, 2, 4):
        n = (11 * bits + 7) // 8
        rows = [bytes((37 * (x + 1) * (y + 3)) % 256 for x in range(n)) for y in range(7)]
        (folder / f"gray{bits}.png").write_bytes(png(11, 7, bits, 0, rows)); files[f"gray{bits}.png"] = None
    (folder / "gray4_transparent.png").write_bytes(png(11, 7, 4, 0, rows[:7], [(b"tRNS", struct.pack(">H", 5))])); files["gray4_transparent.png"] = None
    for o in range(1, 9):
        exif = Image.Exif(); exif[0x112] = o
        save(f"orientation{o}.png", rgb, exif=exif)
    exif = Image.Exif(); exif[0x112] = 6
    save("orientation6.webp", rgb, lossless=True, exif=exif)
    save("orientation6.tiff", rgb, exif=exif)
    lossless = []
    for name in files:
        out = load_image(str(folder / name))
        lossless.append(dict(file=name, size=out.size, crc32=crc(out.tobytes()), mode=Image.open(folder / name).mode))

    files.clear()
    big = Image.fromarray((np.add.outer(np.arange(33) * 5, np.arange(47) * 3)[..., None] * [1, 2, 3] % 256).astype(np.uint8))
    big = big.resize((61, 43), 3)
    for q, s in [(75, 2), (95, 0), (90, 1)]:
        save(f"smooth_q{q}_s{s}.jpg", big, quality=q, subsampling=s)
    save("progressive.jpg", big, quality=85, progressive=True)
    save("gray.jpg", big.convert("L"), quality=80)
    save("noise_q75.jpg", lcg(37, 29), quality=75); save("noise_q95_s0.jpg", lcg(37, 29), quality=95, subsampling=0)
    save("smooth.webp", big, quality=80)
    for o in range(1, 9):
        exif = Image.Exif(); exif[0x112] = o
        save(f"orientation{o}.jpg", lcg(9, 5).resize((24, 16), 2), quality=90, subsampling=0, exif=exif)
    lossy = []
    for name in files:
        out = load_image(str(folder / name))
        out.save(folder / (name + ".png"), optimize=True)
        lossy.append(dict(file=name, size=out.size, crc32=crc(out.tobytes()), max_difference=MAX_DIFFERENCE.get(name, 0)))
    write("images.json", dict(lossless=lossless, lossy=lossy), indent=0)


# Greatest difference in grey levels of our decoder to Pillow's, as measured; a bound for the test.
MAX_DIFFERENCE = json.loads((OUT / "lossy_bounds.json").read_text()) if (OUT / "lossy_bounds.json").exists() else {}

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
           "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
OFFICIAL = ("{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
            "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
            "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
            "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
            "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
            "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
            "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
            "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
          "{% for c in m['content'] %}{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
          "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PYTHONIC = """{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'][0]['text'].strip() %}
    {{- '[' + first.upper()[:3] + '] ' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ('user', 'assistant') %}
        {{ raise_exception('unknown role ' ~ message.role) }}
    {% endif %}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% continue %}{% endif %}
        {{- message.role.title() + ': ' + part.text | trim }}
    {%- endfor %}
{{ eos_token }}
{% endfor %}
{% if add_generation_prompt is defined and add_generation_prompt %}
Assistant:
{%- endif %}
"""


def make_model(folder):
    folder.mkdir(parents=True, exist_ok=True)
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    corpus = ["What is the colour of the bird in this picture? a red bird", "How many circles are there? there are three",
              "the quick brown fox don't they're we'll I'm", "naïve café 日本語 Москва", "  indented\n\n\tcode = value;\r\n"] * 4
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=420, show_progress=False, min_frequency=2,
                                                      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    t.save(str(folder / "tokenizer.json"), pretty=False)
    dump = lambda name, value: (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    dump("tokenizer_config.json", dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None,
                                       unk_token=None, model_max_length=32768, additional_special_tokens=SPECIAL[1:],
                                       clean_up_tokenization_spaces=False, errors="replace", split_special_tokens=False,
                                       add_prefix_space=False, chat_template=CHATML))
    dump("preprocessor_config.json", dict(SETTINGS[0], processor_class="Qwen2VLProcessor", patch_size=14, temporal_patch_size=2, merge_size=2,
                                          do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=3,
                                          rescale_factor=1 / 255, image_mean=[0.48145466, 0.4578275, 0.40821073],
                                          image_std=[0.26862954, 0.26130258, 0.27577711]))
    dump("generation_config.json", dict(eos_token_id=[t.token_to_id("<|im_end|>"), t.token_to_id("<|endoftext|>")]))
    dump("config.json", dict(model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"]))


TEXTS = ["", " ", "a", "Hello, world!", "  two  spaces  ", "tabs\tand\nnewlines\r\n\r\n", "\n\n\n", "a\n", "\na", "1234567890 3.14", "don't DON'T they'RE",
         "naïve café", "cafe\u0301 nai\u0308ve", "日本語のテキスト", "Москва 中文 العربية हिन्दी", "👍🏽 👨‍👩‍👧‍👦 🇨🇭", "a👍b", "x²+y²=z²", "\u00a0nbsp\u2003em",
         "<|im_start|>user\nhi<|im_end|>", "<|image_pad|><|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>What?", "<|not_special|>",
         "<|im_end|>\n<|im_end|>", "def f(x):\n    return x  # ok\n", "https://a.b/c?d=e&f=g", "...!!!???", "A" * 60, "\u200bzero\u200dwidth", "ﬁ ligature ①",
         "mixed 漢字kana１２３", "trailing space ", "What is the colour of the bird?", "\x00\x01\x7f", "é" * 5, "Ωμέγα ß ẞ"]


def text_golden():
    from transformers import AutoImageProcessor, AutoProcessor
    make_model(OUT / "model")
    for name, text in [("qwen2_vl.jinja", OFFICIAL), ("chatml.jinja", CHATML), ("pythonic.jinja", PYTHONIC)]:
        (OUT / name).write_text(text)
    processor = AutoProcessor.from_pretrained(OUT / "model")
    processor.image_processor = AutoImageProcessor.from_pretrained(OUT / "model", backend="pil")
    assert type(processor.image_processor) is Qwen2VLImageProcessorPil
    tok = processor.tokenizer
    cases = [dict(text=t, ids=tok(t)["input_ids"], decoded=tok.decode(tok(t)["input_ids"], skip_special_tokens=True)) for t in TEXTS]
    write("tokens.json", dict(cases=cases, tokenizer_class=type(tok).__name__), indent=0)
    text = lambda t: dict(type="text", text=t)
    image = dict(type="image")
    user = lambda *parts: dict(role="user", content=list(parts))
    model = lambda t: dict(role="assistant", content=[text(t)])
    system = lambda t: dict(role="system", content=[text(t)])
    chats = [[user(text("Hello"))], [user(image, text("What is this?")), model("a red bird")],
             [user(image, text("\nWhat is this?"))], [user(text("first "), image, text(" then "), image, text("?")), model("two")],
             [system("Be brief."), user(image, text("How many?")), model("3"), user(text("Sure?")), model("Yes 👍")],
             [user(text("  spaces kept \n")), model(" naïve\ncafé ")], [user(image)], [user(text("")), model("")]]
    out = []
    for template, body in [("qwen2_vl.jinja", OFFICIAL), ("chatml.jinja", CHATML), ("pythonic.jinja", PYTHONIC)]:
        for n, chat in enumerate(chats):
            if template == "pythonic.jinja" and chat[0]["role"] == "system":
                continue
            n_images = sum(p["type"] == "image" for m in chat for p in m["content"])
            for prompt in (False, True):
                rendered = processor.apply_chat_template(chat, chat_template=body, add_generation_prompt=prompt, tokenize=False,
                                                         eos_token="") if template == "pythonic.jinja" else \
                    processor.apply_chat_template(chat, chat_template=body, add_generation_prompt=prompt, tokenize=False)
                images = [lcg(30 + 40 * i, 50) for i in range(n_images)] or None
                enc = processor(text=[rendered], images=images)
                grids = np.asarray(enc["image_grid_thw"]).tolist() if images else []
                ids = enc["input_ids"][0]
                out.append(dict(template=template, messages=chat, grids=grids, add_generation_prompt=prompt, rendered=rendered,
                                input_ids=[int(i) for i in ids]))
    write("conversations.json", dict(cases=out), separators=(",", ":"))
    auto = AutoProcessor.from_pretrained(OUT / "model")
    print("AutoProcessor picks", type(auto.image_processor).__name__)
    a = auto.image_processor(images=[lcg(250, 333)], return_tensors="np")["pixel_values"]
    b = processor.image_processor(images=[lcg(250, 333)], return_tensors="np")["pixel_values"]
    print("its greatest difference to the Pillow backend:", np.abs(a - b).max())


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    resize_golden()
    pixel_golden()
    image_golden()
    text_golden()
    print(sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()), "bytes")
