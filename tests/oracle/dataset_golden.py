"""Writes testdata/dataset: the same questions as parquet, TSV and JSONL, for the readers' tests.

Run with an environment that has pyarrow and Pillow:
    python tests/oracle/dataset_golden.py
"""
import base64, csv, io, json, pathlib, zipfile

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

OUT = pathlib.Path(__file__).resolve().parents[2] / "testdata" / "dataset"
OUT.mkdir(parents=True, exist_ok=True)


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(out, "PNG")
    return out.getvalue()


COLORS = ["red", "green", "blue", "white"]
IMAGES = [png(c) for c in COLORS]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
rows = dict(id=[f"q{i}" for i in range(40)],
            image=[dict(bytes=IMAGES[i % 4], path=f"{i % 4:05}.png") for i in range(40)],
            question=[f"Which colour is number {i}?" for i in range(40)], answer=[COLORS[i % 4] for i in range(40)],
            category=[["colour", None][i % 2] for i in range(40)])
schema = pa.schema([("id", pa.string()), ("image", IMAGE), ("question", pa.string()), ("answer", pa.string()), ("category", pa.string())])
table = pa.table(rows, schema=schema)
pq.write_table(table, OUT / "zstd_dictionary.parquet", compression="zstd", row_group_size=16)
pq.write_table(table, OUT / "snappy_plain.parquet", compression="snappy", use_dictionary=False, data_page_version="2.0")
turn = pa.struct([("from", pa.string()), ("value", pa.string())])
chat = pa.table(dict(images=[[dict(bytes=IMAGES[0], path=None), dict(bytes=IMAGES[1], path=None)], []],
                     conversations=[[{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "no"}],
                                    [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]],
                     number=pa.array([7, 2**40])),
                schema=pa.schema([("images", pa.list_(IMAGE)), ("conversations", pa.list_(turn)), ("number", pa.int64())]))
pq.write_table(chat, OUT / "conversations.parquet")
big = base64.b64encode(IMAGES[0]).decode()
with open(OUT / "choices.tsv", "w", newline="") as f:
    w = csv.writer(f, delimiter="\t", lineterminator="\n")
    w.writerow(["index", "image", "question", "hint", "A", "B", "answer", "category"])
    w.writerow([10, big, 'Which "colour"?', "", "red", "blue", "A", "colour"])
    w.writerow([11, "10", "Two lines\nand a tab\there?", "look", "yes", "no", "B", ""])
folder = OUT / "folder"
folder.mkdir(exist_ok=True)
with zipfile.ZipFile(folder / "images.zip", "w") as z:
    for i, data in enumerate(IMAGES):
        info = zipfile.ZipInfo(f"{i:05}.png", (2024, 1, 1, 0, 0, 0))
        info.compress_type = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
        z.writestr(info, data)
with open(folder / "samples.jsonl", "w") as f:
    for i in range(12):
        f.write(json.dumps({"id": f"s{i}", "image": f"{i % 4:05}.png", "conversations": [
            {"from": "human", "value": f"<image>\nWhich colour is number {i}?"}, {"from": "gpt", "value": COLORS[i % 4]}]}) + "\n")
(OUT / "versions.json").write_text(json.dumps(dict(pyarrow=pa.__version__, pillow=PIL.__version__, script="tests/oracle/dataset_golden.py")) + "\n")
