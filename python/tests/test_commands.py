"""Functions do what commands do, with rows from memory as well."""

import inspect
import json
import threading
import time
from pathlib import Path

import datasets
import pytest
import vlmq
from conftest import CALIBRATION, EVAL, MODEL
from PIL import Image

WEIGHTS = "model.safetensors"
SMALL = {"bits": 3, "group_size": 64, "samples": 8}


def weights_of(folder):
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Eight samples of the bundled file."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    found = vlmq.quantize(MODEL, folder, calibration=CALIBRATION, **SMALL)
    return folder, found


def test_a_function_writes_what_the_command_writes(quantized, program, tmp_path):
    folder, found = quantized
    other = tmp_path / "other"
    done = program("quantize", MODEL, "--calibration", CALIBRATION, "--output", other, "--bits", 3,
                   "--group-size", 64, "--samples", 8, "--json")
    assert weights_of(folder) == weights_of(other)
    told = json.loads(done.stdout)
    assert found.keys() == told.keys() and found["command"] == "quantize"
    assert found["report"]["modules"] == told["report"]["modules"]
    written = json.loads((folder / "vlmq_report.json").read_text())
    assert written["command"].startswith("vlmq quantize model ")


def test_rows_in_memory_are_the_rows_of_the_file(quantized, rows, tmp_path):
    folder, _ = quantized
    vlmq.quantize(MODEL, tmp_path / "rows", calibration=rows, **SMALL)
    assert weights_of(tmp_path / "rows") == weights_of(folder)


def as_messages(row):
    """The same row as chat messages whose part holds the image."""
    question, answer = row["conversations"]
    text = question["value"].removeprefix("<image>\n")
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content},
                         {"role": "assistant", "content": answer["value"]}]}


def test_chat_messages_and_questions_are_the_same_conversations(quantized, rows, tmp_path):
    folder, _ = quantized
    vlmq.quantize(MODEL, tmp_path / "chat", calibration=[as_messages(row) for row in rows], **SMALL)
    assert weights_of(tmp_path / "chat") == weights_of(folder)
    questions = [{"question": row["conversations"][0]["value"].removeprefix("<image>\n"),
                  "answer": row["conversations"][1]["value"], "images": [row["image"]]} for row in rows]
    vlmq.quantize(MODEL, tmp_path / "questions", calibration=tuple(questions), **SMALL)
    assert weights_of(tmp_path / "questions") == weights_of(folder)


@pytest.mark.parametrize("decode", [True, False])
def test_data_sets_are_rows(quantized, rows, tmp_path, decode):
    folder, _ = quantized
    columns = {"image": [row["image"] for row in rows],
               "conversations": [row["conversations"] for row in rows]}
    data = datasets.Dataset.from_dict(columns)
    data = data.cast_column("image", datasets.Image(decode=decode))
    vlmq.quantize(MODEL, tmp_path / "model", calibration=data, **SMALL)
    assert weights_of(tmp_path / "model") == weights_of(folder)


def test_only_the_chosen_rows_are_looked_at(rows, tmp_path):
    class Lazy:
        asked = []

        def __len__(self):
            return 100_000

        def __getitem__(self, number):
            self.asked.append(number)
            return rows[number % len(rows)]

    lazy = Lazy()
    vlmq.plan(MODEL, calibration=lazy, samples=5, seed=3)
    assert len(lazy.asked) == 5 and max(lazy.asked) > len(rows)
    assert lazy.asked == sorted(set(lazy.asked))
    streamed = iter(rows)
    assert vlmq.plan(MODEL, calibration=streamed, samples=5)["n_samples"] == 5
    assert next(streamed) is rows[5]


def test_every_kind_of_image_is_taken(rows, tmp_path):
    picture = rows[0]["image"].convert("RGB")
    path = tmp_path / "picture.bmp"
    picture.save(path)
    images = [picture, picture.convert("RGBA"), path, str(path), path.read_bytes(),
              {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    for image in images:
        row = {"question": "what?", "answer": "that", "image": image}
        other = {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "image": image}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yes", "image": None}]}]}
        found = vlmq.plan(MODEL, calibration=[row, other])
        assert found["n_samples"] == 2 and found["n_tokens"] > 100
    floats = Image.new("F", (64, 64), 100.0)
    assert vlmq.plan(MODEL, calibration=[{"question": "a", "answer": "b", "image": floats}])["n_samples"] == 1


def test_rows_that_cannot_be_are_named(rows, tmp_path):
    good = {"question": "what?", "answer": "that"}
    with pytest.raises(TypeError, match="row 1: an image expected"):
        vlmq.plan(MODEL, calibration=[good, {**good, "image": 3}])
    with pytest.raises(TypeError, match="row 1: a mapping expected, str found"):
        vlmq.plan(MODEL, calibration=[good, "a row"])
    with pytest.raises(TypeError, match="row 0: .*not JSON serializable"):
        vlmq.plan(MODEL, calibration=[{**good, "answer": {3}}])
    with pytest.raises(vlmq.Error, match=r"samples.jsonl: line 2: 2 image places .* but 0 images"):
        vlmq.plan(MODEL, calibration=[good, {"conversations": [
            {"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}]}])
    with pytest.raises(vlmq.Error, match="has 1 to 1 to choose from"):
        vlmq.plan(MODEL, calibration=[good], samples=2)
    with pytest.raises(TypeError, match="a path or rows expected"):
        vlmq.plan(MODEL, calibration=good)
    with pytest.raises(vlmq.Error, match="images are not downloaded"):
        vlmq.plan(MODEL, calibration=[{**good, "image": "https://example.com/a.png"}])


def test_scales_are_tuned_on_more_rows_than_are_chosen(rows, tmp_path):
    settings = {"tune_steps": 2}
    arguments = {"bits": 3, "group_size": 64, "samples": 8, "settings": settings}
    vlmq.quantize(MODEL, tmp_path / "file", calibration=CALIBRATION, **arguments)
    vlmq.quantize(MODEL, tmp_path / "rows", calibration=rows, **arguments)
    assert weights_of(tmp_path / "file") == weights_of(tmp_path / "rows")


def test_errors_have_the_text_of_the_program(program, tmp_path):
    for arguments, words in [
        ({"bits": 5}, ["--bits", "5"]),
        ({"group_size": 48}, ["--group-size", "48"]),
        ({"method": "magic"}, ["--method", "magic"]),
        ({"settings": {"no_such": 1}}, ["--set", "no_such=1"]),
        ({"format": "zip"}, ["--format", "zip"]),
    ]:
        with pytest.raises(vlmq.Error) as raised:
            vlmq.quantize(MODEL, tmp_path / "x", calibration=CALIBRATION, **arguments)
        done = program("quantize", MODEL, "--calibration", CALIBRATION, "--output", tmp_path / "x", *words,
                       exit_code=2)
        assert raised.value.message in done.stderr, words
        assert raised.value.message and raised.value.hint
        assert str(raised.value) == f"{raised.value.message}\nhint: {raised.value.hint}"
    with pytest.raises(vlmq.Error, match="no-such-folder"):
        vlmq.inspect("no-such-folder")
    with pytest.raises(vlmq.Error, match="-odd"):
        vlmq.inspect("-odd")
    assert not (tmp_path / "x").exists()


def test_progress_is_told_on_the_calling_thread(tmp_path):
    steps, threads = [], set()

    def hear(progress):
        steps.append(progress)
        threads.add(threading.current_thread())

    vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, progress=hear, **SMALL)
    layers = [step.n_done for step in steps if step.what == "layers"]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}
    assert {step.n for step in steps if step.what == "layers"} == {4}
    assert {"solve", "statistics", "importance"} <= {step.stage for step in steps}
    assert threads == {threading.current_thread()}


def test_an_exception_of_the_listener_ends_the_run(quantized, tmp_path):
    folder, _ = quantized
    output = tmp_path / "model"

    def hear(progress):
        if progress.n_done == 2:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        vlmq.quantize(MODEL, output, calibration=CALIBRATION, progress=hear, **SMALL)
    assert not output.exists()
    with pytest.raises(vlmq.Error, match="other"):
        vlmq.quantize(MODEL, output, calibration=CALIBRATION, seed=1, **SMALL)
    found = vlmq.quantize(MODEL, output, calibration=CALIBRATION, resume="required", **SMALL)
    assert found["report"]["n_resumed_layers"] >= 1
    assert weights_of(output) == weights_of(folder)


def test_other_threads_run_meanwhile(tmp_path):
    count, is_done = 0, False

    def work():
        nonlocal count
        while not is_done:
            count += 1
            time.sleep(0.001)

    other = threading.Thread(target=work)
    other.start()
    began = time.monotonic()
    vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, bits=3, group_size=64, samples=64)
    seconds, n = time.monotonic() - began, count
    is_done = True
    other.join()
    # A thousand a second at best; with the lock held all the time there would be one or two.
    assert n > 20 * seconds, (n, seconds)


def test_two_runs_side_by_side(quantized, tmp_path):
    folder, _ = quantized
    failed = []

    def run(name):
        try:
            vlmq.quantize(MODEL, tmp_path / name, calibration=CALIBRATION, threads=1, **SMALL)
        except vlmq.Error as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") == weights_of(folder)


def test_evaluation(quantized, program, tmp_path):
    folder, _ = quantized
    steps = []
    found = vlmq.evaluate(folder, EVAL, limit=8, reference=MODEL, progress=steps.append)
    done = program("eval", folder, "--task", EVAL, "--limit", 8, "--reference", MODEL, "--json")
    assert found == json.loads(done.stdout)
    assert steps[-1].n_done == steps[-1].n == 8 * len(found["tasks"])
    task = datasets.Dataset.from_parquet(str(EVAL / "counting.parquet"), cache_dir=str(tmp_path))
    mine = vlmq.evaluate(folder, {"mine": task.select(range(8))}, reference=MODEL)
    counting = found["tasks"]["counting"]
    assert mine["tasks"]["mine"]["score"]["percent"] == counting["score"]["percent"]
    assert mine["tasks"]["mine"]["kl_per_answer_token"] == counting["kl_per_answer_token"]
    several = vlmq.evaluate(folder, [EVAL / "counting.parquet", EVAL / "emoji.parquet"], limit=2)
    assert set(several["tasks"]) == {"counting", "emoji"}
    texts = vlmq.evaluate(folder, [{"text": "the shape is blue"}, {"text": "how many are there?"}])
    assert texts["tasks"]["task"]["n_texts"] == 2
    with pytest.raises(vlmq.Error):
        vlmq.evaluate(folder, {"docvqa": "no-such-folder"})
    with pytest.raises(ValueError, match="no name for a task"):
        vlmq.evaluate(folder, {"../up": [{"text": "x"}]})


def test_the_other_commands(quantized, rows, tmp_path):
    folder, _ = quantized
    about = vlmq.inspect(folder)
    assert about["n_quantized_modules"] == about["n_modules"] == 28
    picture = tmp_path / "picture.png"
    rows[0]["image"].save(picture)
    assert vlmq.generate(folder, "how many shapes are there?", [picture], max_new_tokens=4)["text"]
    evaluation = vlmq.evaluate(folder, EVAL, limit=2)
    exported = vlmq.export(folder, tmp_path / "gptq", format="gptq", evaluation=evaluation)
    assert exported["n_modules"] == 28
    assert "counting" in (tmp_path / "gptq/README.md").read_text()
    assert vlmq.verify(folder, against=MODEL)["verification"]["problems"] == []
    page = vlmq.report(folder, output=tmp_path / "page.html")
    assert Path(page["output"]).read_text().startswith("<!DOCTYPE html>")
    assert vlmq.report(folder, markdown=True)["markdown"].startswith("#")
    with pytest.raises(vlmq.Error, match="as they are"):
        vlmq.pad(MODEL, tmp_path / "padded", for_tp=1, group_size=1)
    assert vlmq.pad(MODEL, tmp_path / "padded", for_tp=2, group_size=80)["padded"]["n_changed"] == 12
    assert vlmq.rotate(MODEL, tmp_path / "turned", seed=1)["n_changed"] > 0
    vlmq.evaluate(folder, EVAL / "counting.parquet", limit=4, output=tmp_path / "answers")
    scored = vlmq.score(tmp_path / "answers/samples_counting.jsonl")
    assert scored["score"]["n"] == 4
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f'model = "{MODEL}"\ncalibration = "{CALIBRATION}"\ntasks = "{EVAL}"\nsamples = 4\n'
                     'seeds = [0]\nmethods = ["rtn"]\nbits = [4]\ngroup_sizes = [64]\nlimit = 2\n')
    assert len(vlmq.compare(sweep, tmp_path / "rows.jsonl")["rows"]) == 2


def test_calibration_apart_by_shards(tmp_path):
    rows = datasets.load_dataset("json", data_files=str(CALIBRATION / "samples.jsonl"), split="train")
    questions = [row["conversations"][0]["value"].replace("<image>", "") for row in rows.select(range(4))]
    texts = [{"text": question * 200} for question in questions]
    shards = []
    for shard in (1, 2):
        shards.append(tmp_path / f"part-{shard}")
        made = vlmq.calibrate(MODEL, shards[-1], calibration=texts, shard=(shard, 2), max_tokens=256)
        assert made["n_shards"] == 2 and made["n_layers"] == 4
    assert vlmq.merge(shards[1:], tmp_path / "half")["missing_shards"] == [1]
    with pytest.raises(vlmq.Error, match="1 of 2 shards are missing"):
        vlmq.quantize(MODEL, tmp_path / "out", statistics=tmp_path / "half", method="gptq", group_size=64)
    assert vlmq.merge(shards, tmp_path / "all")["missing_shards"] == []
    done = vlmq.quantize(MODEL, tmp_path / "out", statistics=tmp_path / "all", method="gptq", bits=3,
                         group_size=64)
    assert len(done["report"]["modules"]) == 28
    assert vlmq.verify(tmp_path / "out")["verification"]["problems"] == []


def test_a_damaged_folder_is_no_exception_of_verify(quantized, tmp_path):
    folder, _ = quantized
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "tokenizer.json").unlink()
    assert vlmq.verify(damaged)["verification"]["problems"]


def test_every_public_function_says_what_it_does():
    for name in vlmq.__all__:
        public = getattr(vlmq, name)
        if callable(public):
            assert inspect.getdoc(public), name


def test_nothing_is_printed(tmp_path, capfd):
    with pytest.raises(LookupError):
        vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION,
                      progress=lambda step: {}[step], **SMALL)
    vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, **SMALL)
    vlmq.evaluate(tmp_path / "model", EVAL, limit=2)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_a_bar_is_drawn_where_it_is_asked_for(tmp_path, capsys):
    vlmq.quantize(MODEL, tmp_path / "model", calibration=CALIBRATION, progress=True, **SMALL)
    assert "layers" in capsys.readouterr().err
