"""Files as the benchmarks' users have them, with made-up rows: lmms-eval's parquet, VLMEvalKit's TSV, JSONL.

Columns and types are those of the published sets; questions and pictures are not.
"""

import base64
import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT, TEXTS = pa.string(), pa.list_(pa.string())
OPTIONS = ["(A) a red one", "(B) two", "(C) none", "(D) 4", "(E) The image does not feature it."]


def picture(i):
    # No plain colour: VLMEvalKit takes an image of 64 characters or less for a reference.
    image = Image.new("RGB", (28 + i % 3, 28), (40 * i % 256, 90, 160))
    image.putpixel((i % 28, 3), (255, 255, 255))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def lmms_row(benchmark, i):
    question = ["what IS the title?", "How many? ", "ΣΑΣ ﬁnds", "Was there: rain?\nSay."][i % 4]
    if benchmark == "chartqa":
        kinds = ["human_test", "augmented_test"]
        return dict(type=kinds[i % 2], question=question, answer=["14", "Yes", "0.57"][i % 3])
    if benchmark == "docvqa":
        return dict(questionId=str(i), question=question, question_types=["form"], docId=i, data_split="val",
                    ucsf_document_id="x", ucsf_document_page_no="1", answers=["Acme Ltd", "ACME"])
    if benchmark == "textvqa":
        return dict(image_id=f"{i:x}", question_id=i, question=question, question_tokens=["what"],
                    answers=["stop"] * 10, image_width=28, image_height=28, ocr_tokens=["STOP"],
                    set_name="val")
    if benchmark == "vizwiz":
        return dict(question_id=f"VizWiz_val_{i}", question=question, category="other",
                    answers=["unanswerable"] * 6 + ["can"] * 4)
    if benchmark.startswith("mme-realworld"):
        task = ["Perception/OCR with Complex Context", "Reasoning/Monitoring"][i % 2]
        return {"index": i, "question": question, "multi-choice options": OPTIONS, "answer": "ABCDE"[i % 5],
                "category": task, "l2-category": ["License", "person/Attribute/color"][i % 2]}
    if benchmark == "scienceqa":
        return dict(question=question, choices=["solid", "liquid", "gas"][:2 + i % 2], answer=i % 2,
                    hint=["", "It flows."][i % 2], task="closed choice", grade="grade2",
                    subject="natural science", topic="physics", category="Materials",
                    skill="x", lecture="", solution="")
    if benchmark == "seedbench-2-plus":
        return dict(question_id=str(i), question=question, choice_A="red", choice_B="4.png", choice_C="blue",
                    choice_D="none", answer="ABCD"[i % 4], data_id=f"chart/{i}.png", level="L1",
                    question_image_subtype="bar", data_source="x", data_type="Single Image",
                    question_type_id=1, question_image_type=["chart", "map", "web"][i % 3])
    kinds = [("Regular Text Recognition", "IIIT5K"), ("Doc-oriented VQA", "docVQA"),
             ("Handwritten Mathematical Expression Recognition", "HME100k")]
    return dict(dataset=kinds[i % 3][1], question=f" {question} ", question_type=kinds[i % 3][0],
                answer=["CENTRE", "centre 2"])


def column_type(value):
    if isinstance(value, list):
        return TEXTS
    return pa.int64() if isinstance(value, int) else TEXT


def write_parquet(path, benchmark, n):
    """In small row groups, as large images have them."""
    rows = [lmms_row(benchmark, i) for i in range(n)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    fields = [(key, column_type(values[0])) for key, values in columns.items()]
    if benchmark.startswith("mme-realworld"):
        columns["bytes"] = [base64.b64encode(picture(i)).decode() for i in range(n)]
        fields.append(("bytes", TEXT))
    else:
        columns["image"] = [dict(bytes=picture(i), path=None) for i in range(n)]
        fields.append(("image", IMAGE))
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), path, row_group_size=3)
    return rows


def table_row(benchmark, i):
    row = lmms_row(benchmark, i)
    question = row["question"]
    if benchmark == "chartqa":
        split = ["test_human", "test_augmented"][i % 2]
        return dict(question=question, answer=str([row["answer"]]), split=split)
    if benchmark in ("docvqa", "textvqa"):
        return dict(question=question, answer=str(row["answers"]))
    if benchmark == "vizwiz":
        return dict(question=question, answers=str(row["answers"]))
    if benchmark.startswith("mme-realworld"):
        heading = "选项如下所示:\n" if benchmark.endswith("cn") else "The choices are listed below:\n"
        letters = {option[1]: option[4:] for option in OPTIONS}
        return {"question": question, "multi-choice options": heading + "\n".join(OPTIONS), **letters,
                "answer": row["answer"], "category": row["category"], "l2-category": row["l2-category"]}
    if benchmark == "scienceqa":
        # "None" is no option to VLMEvalKit, whose reader takes it for a missing cell.
        return dict(question=question, hint=row["hint"], A="solid", B="a\tliquid",
                    C=["gas", "None"][i % 2], D="", answer="AB"[i % 2], split="test", category="Materials")
    if benchmark == "seedbench-2-plus":
        return dict(question=question, A="red", B="4.png", C="blue", D="none", answer=row["answer"],
                    category=row["question_image_type"])
    return dict(question=question, answer=str(row["answer"]), category=row["question_type"])


def write_table(path, benchmark, n):
    """Every fourth image is a reference to the row after it, and every eighth to one before it."""
    rows = [table_row(benchmark, i) for i in range(n)]
    images = [base64.b64encode(picture(i)).decode() for i in range(n)]
    for i in range(0, n - 1, 4):
        images[i] = str(i + 1 if i % 8 == 0 else i - 1)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", *rows[0]])
        for i, row in enumerate(rows):
            writer.writerow([i, images[i], *row.values()])
    return rows


def write_chartqa(folder, n):
    """ChartQA's own files: first all questions of one kind, then all of the other."""
    rows = [lmms_row("chartqa", i) for i in range(n)]
    (folder / "png").mkdir(parents=True)
    for kind in ["human", "augmented"]:
        found = []
        for i, row in enumerate(rows):
            if row["type"] == f"{kind}_test":
                (folder / f"png/{i}.png").write_bytes(picture(i))
                found.append(dict(imgname=f"{i}.png", query=row["question"], label=row["answer"]))
        (folder / f"test_{kind}.json").write_text(json.dumps(found))


def write_jsonl(path, benchmark, n):
    """Rows in lmms-eval's form, images as files beside them."""
    rows = [lmms_row(benchmark, i) for i in range(n)]
    with open(path, "w") as file:
        for i, row in enumerate(rows):
            (path.parent / f"{i}.png").write_bytes(picture(i))
            file.write(json.dumps(dict(row, image=f"{i}.png")) + "\n")
    return rows
