"""The program's commands as functions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from . import _vlmq
from ._data import Data, samples_file, task_files
from ._progress import Callback, listener

StrPath: TypeAlias = str | os.PathLike[str]
Format: TypeAlias = Literal["compressed-tensors", "gptq", "awq", "mlx", "gguf", "bf16", "f16", "f32"]


def quantize(
    model: StrPath,
    output: StrPath,
    *,
    calibration: Data | None = None,
    statistics: StrPath | None = None,
    method: str = "vlmq",
    bits: float = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    recipe: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    shards: int | None = None,
    format: Format = "compressed-tensors",
    resume: Literal["auto", "required", "never"] = "auto",
    memory: str | int | None = None,
    remake_inputs: bool = False,
    imatrix: bool = False,
    report: bool = False,
    threads: int | None = None,
    progress: Callback = None,
) -> dict[str, Any]:
    """Quantizes the model in the folder `model` into the new folder `output`.

    calibration: a file or folder that the program reads, or rows: a list of dicts with PIL images, or a
        data set of `datasets`. Rows have `messages`, `conversations`, `question` and `answer`, or `text`.
    statistics: a folder that `calibrate` or `merge` made, in place of samples.
    method: rtn, awq, mbq, gptq, gptaq, qronos, vlmq-v1, vlmq-v2 or vlmq.
    bits: 2, 3, 4 or 8, or a mean that is shared out among modules, as 2.5.
    group_size: input columns that share a scale; None for one scale per output channel.
    symmetric: a grid centred on zero instead of one with a zero point.
    recipe: rules per module, a TOML file.
    settings: as `--set` has them, {"tune_steps": 100}.
    samples: how many rows; 128 if absent, or all of fewer rows in memory. seed: of their choice.
    max_tokens: raw texts are read in pieces of at most so many; 2048 if absent.
    shards: in how many parts samples are summed up, one after the other; 1 if absent.
    resume: what to do with the layers that an earlier run for the same output finished.
    memory: what to stay below, as "8GiB" or in bytes.
    remake_inputs: make the widest hidden states again whenever they are wanted, rather than keep them.
    imatrix, report: what is written beside the model, llama.cpp's importance matrix and report.html.
    threads: all cores if absent.
    progress: called with each `Progress`; True for a bar of tqdm.

    Returns the report of the run under "report", "output" and "tensor_bytes".
    """
    words = _recipe_flags(method, bits, group_size, symmetric, recipe, settings)
    words += _flags(seed=seed, max_tokens=max_tokens, format=format, memory=memory)
    words += _flags(output=output, resume=resume, imatrix=imatrix, report=report)
    words += _flags(statistics=statistics, shards=shards, remake_inputs=remake_inputs)
    with _calibration_flags(calibration, samples, seed, settings) as data:
        return _done(["quantize", _path(model), *words, *data], threads, progress)


def calibrate(
    model: StrPath,
    output: StrPath,
    *,
    calibration: Data,
    method: str = "gptq",
    settings: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    shard: tuple[int, int] = (1, 1),
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Callback = None,
) -> dict[str, Any]:
    """Sums up what a model's linears see of samples, in full precision, for `quantize(statistics=…)`.

    method, settings: gptq, or vlmq-v1 and vlmq-v2 with an importance that needs no quantized stream, as
        {"importance_loss": "answer"}.
    shard: the first of two parts of the samples as (1, 2); `merge` adds them up. Every part needs the
        same `calibration`, `samples` and `seed`.
    The rest as for `quantize`.
    """
    words = _flags(output=output, method=method, seed=seed, max_tokens=max_tokens, memory=memory)
    words += _flags(shard=f"{shard[0]}/{shard[1]}", set=assignments(settings))
    with _calibration_flags(calibration, samples, seed, settings) as data:
        return _done(["calibrate", _path(model), *words, *data], threads, progress)


def merge(folders: Sequence[StrPath], output: StrPath) -> dict[str, Any]:
    """Adds up what `calibrate` made of shards of the samples; "missing_shards" are those still to come."""
    return _done(["merge", *[_path(folder) for folder in folders], *_flags(output=output)])


def plan(
    model: StrPath,
    *,
    calibration: Data | None = None,
    method: str = "vlmq",
    bits: float = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    recipe: StrPath | None = None,
    settings: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    format: Format = "compressed-tensors",
    memory: str | int | None = None,
    remake_inputs: bool = False,
    threads: int | None = None,
    progress: Callback = None,
) -> dict[str, Any]:
    """Says what `quantize` with the same arguments would do and what it would cost, in memory and on
    disk, and does nothing."""
    words = _recipe_flags(method, bits, group_size, symmetric, recipe, settings)
    words += _flags(seed=seed, max_tokens=max_tokens, format=format, memory=memory)
    words += _flags(remake_inputs=remake_inputs, dry_run=True)
    with _calibration_flags(calibration, samples, seed, settings) as data:
        return _done(["quantize", _path(model), *words, *data], threads, progress)


def _recipe_flags(
    method: str,
    bits: float,
    group_size: int | None,
    symmetric: bool,
    recipe: StrPath | None,
    settings: Mapping[str, Any] | None,
) -> list[str]:
    columns = -1 if group_size is None else group_size
    return _flags(method=method, bits=f"{bits:g}", group_size=columns, symmetric=symmetric, recipe=recipe,
                  set=assignments(settings))


@contextmanager
def _calibration_flags(
    data: Data | None,
    samples: int | None,
    seed: int,
    settings: Mapping[str, Any] | None,
) -> Iterator[list[str]]:
    """Rows in memory lie in files meanwhile."""
    if data is None:
        yield []
        return
    # Scales are tuned on other rows as well.
    takes_more = any(key.startswith("tune_") for key in settings or {})
    with samples_file(data, samples, seed, takes_more) as (path, n):
        yield _flags(calibration=path, samples=n)


def inspect(model: StrPath) -> dict[str, Any]:
    """Family, size and linears of a model, and what each number format would make of it."""
    return _done(["inspect", _path(model)])


def evaluate(
    model: StrPath,
    tasks: Data | Sequence[StrPath] | Mapping[str, Data],
    *,
    protocol: Literal["lmms-eval", "vlmevalkit"] = "lmms-eval",
    skip: int = 0,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    max_tokens: int | None = None,
    reference: StrPath | None = None,
    seed: int = 0,
    output: StrPath | None = None,
    threads: int | None = None,
    progress: Callback = None,
) -> dict[str, Any]:
    """Answers the questions of tasks and scores the answers; raw texts are predicted.

    tasks: a file or folder, several, or by name: {"docvqa": "DocVQA/"} asks by a benchmark's rules, and
        {"mine": rows} rows in memory, with `question` and `answer` as a rule.
    protocol: whose prompts and metrics benchmarks follow.
    skip, limit: questions or texts of each task before the first, and at most.
    reference: the original, or another: who answers better, what flipped, how far apart they are.
    output: a folder for every answer; a run that was ended goes on in it.

    Returns the scores by task under "tasks".
    """
    with task_files(tasks) as paths:
        words = ["eval", _path(model)] + _flags(
            task=paths, protocol=protocol, skip=skip, limit=limit, max_new_tokens=max_new_tokens,
            max_tokens=max_tokens, reference=reference, seed=seed, output=output)
        return _done(words, threads, progress)


def generate(
    model: StrPath,
    prompt: str,
    images: Iterable[StrPath] = (),
    *,
    max_new_tokens: int = 128,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answers one prompt about images, which stand before the text. Returns "text" and "output_ids"."""
    words = ["generate", _path(model)]
    words += _flags(prompt=prompt, image=[os.fspath(image) for image in images],
                    max_new_tokens=max_new_tokens)
    return _done(words, threads)


def export(
    model: StrPath,
    output: StrPath,
    *,
    format: Format,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a quantized folder once more, in another format; no code is touched.

    evaluation: what `evaluate` returned of this model, for the model card.
    """
    with ExitStack() as files:
        path = None
        if evaluation is not None:
            folder = files.enter_context(tempfile.TemporaryDirectory(prefix="vlmq-"))
            path = Path(folder, "evaluation.json")
            path.write_text(json.dumps(evaluation))
        words = _flags(format=format, output=output, evaluation=path)
        return _done(["export", _path(model), *words])


def verify(model: StrPath, *, against: StrPath | None = None) -> dict[str, Any]:
    """Reads a quantized folder as its readers will, and compares it with its source. What is wrong is in
    "verification", "problems", and raises nothing."""
    return _done(["verify", _path(model), *_flags(against=against)])


def rotate(
    model: StrPath,
    output: StrPath,
    *,
    kind: Literal["hadamard", "random"] = "hadamard",
    seed: int = 0,
    float32: bool = False,
) -> dict[str, Any]:
    """Turns a model's residual stream by an orthogonal matrix, its function kept, into a new folder."""
    return _done(["rotate", _path(model), *_flags(output=output, kind=kind, seed=seed, float32=float32)])


def pad(model: StrPath, output: StrPath, *, for_tp: int, group_size: int = 128) -> dict[str, Any]:
    """Widens a model's MLPs by zeros, its function kept, so that `for_tp` devices can share it out in whole
    groups."""
    return _done(["pad", _path(model), *_flags(output=output, for_tp=for_tp, group_size=group_size)])


def report(
    folder: StrPath,
    *,
    output: StrPath | None = None,
    markdown: bool = False,
    evaluation: StrPath | None = None,
    original: StrPath | None = None,
    tasks: StrPath | Sequence[StrPath] | Mapping[str, StrPath] = (),
) -> dict[str, Any]:
    """Writes what a run did as a page with pictures, report.html in the folder if `output` is absent;
    with `markdown` returns it as "markdown", or writes that.

    evaluation, original: the `output` folders of `evaluate`, of this model and of the original.
    tasks: files or folders, or by name of benchmark, as `evaluate` had them, for questions and pictures.
    """
    with task_files(tasks) as paths:
        words = _flags(output=output, markdown=markdown, evaluation=evaluation, original=original, task=paths)
        return _done(["report", _path(folder), *words])


def score(
    samples: StrPath,
    *,
    against: StrPath | None = None,
    benchmark: str | None = None,
    protocol: Literal["lmms-eval", "vlmevalkit"] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores answers that were written down, and holds them against another model's."""
    words = _flags(against=against, benchmark=benchmark, protocol=protocol, seed=seed)
    return _done(["score", _path(samples), *words])


def compare(
    sweep: StrPath,
    output: StrPath,
    *,
    threads: int | None = None,
    progress: Callback = None,
) -> dict[str, Any]:
    """Runs methods, formats and seeds on one model, as a TOML file says; lines are added to `output` as
    they are measured, and those that it has are kept."""
    return _done(["compare", _path(sweep), *_flags(output=output)], threads, progress)


def assignments(settings: Mapping[str, Any] | None) -> list[str]:
    """Settings as `--set` has them."""
    text = {True: "true", False: "false"}
    pairs = (settings or {}).items()
    return [f"{key}={text[value] if isinstance(value, bool) else value}" for key, value in pairs]


def _path(path: StrPath) -> str:
    """A path that is not taken for a flag."""
    path = os.fspath(path)
    return os.path.join(".", path) if path.startswith("-") else path


def _flags(**values: Any) -> list[str]:
    """Values as flags: lists are flags several times, None and False none."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag}={one}" for one in value]
        elif value is not None and value is not False:
            words.append(f"{flag}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    return words


def _done(words: list[str], threads: int | None = None, progress: Callback = None) -> dict[str, Any]:
    with listener(progress) as on_step:
        found, _, _ = _vlmq.call([*words, *_flags(threads=threads)], on_step)
    return json.loads(found) if found else {}
