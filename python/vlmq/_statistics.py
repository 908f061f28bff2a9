"""What a calibration pass sums up, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _vlmq
from ._commands import assignments
from ._data import Data, samples_file

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One calibration sample; a long raw text is several."""

    origin: str
    """File and line."""
    input_ids: NDArray[np.uint32]
    classes: list[str]
    """One for each token: `vision`, `prompt`, `answer`, `special` or `text`."""


@dataclass(frozen=True)
class Group:
    """What linears see that share their inputs and their token weights."""

    layer: int
    modules: list[str]
    """By their names in the checkpoint."""
    n_tokens: int
    effective_sample_size: float
    """(Σω)² / Σω²."""
    hessian: NDArray[np.float32]
    """H = Σ ω u uᵀ, [in, in], in the stream of what is quantized so far; neither halved nor averaged."""
    cross: NDArray[np.float32] | None
    """C = Σ ω (f − u) uᵀ, [in, in], where the method corrects for drift and sums it up at the input."""
    output_cross: NDArray[np.float32] | None
    """S = Σ ω (W (f − u) + d) uᵀ, [out, in], in place of C where the method sums it up at the output; d is what
    the residual stream lacks, where the method gives that back too."""
    weights: list[NDArray[np.float32]] | None
    """ω for each token of each sample; None where all tokens weigh alike."""
    factors: list[NDArray[np.float32]] | None
    """g, the importance factors that ω is made of; None where there are none."""


class Statistics:
    """An iterator over groups, in the order in which their linears are solved; the pass waits while a
    group is looked at, and ends when this is closed or let go."""

    def __init__(self, groups: _vlmq.Groups, files: ExitStack) -> None:
        self._groups = groups
        self._files = files
        self._samples: list[Sample] | None = None

    @property
    def samples(self) -> list[Sample]:
        """The samples, in the order of `weights` and `factors`; waits until they are read."""
        if self._samples is None:
            self._samples = [Sample(**sample) for sample in self._groups.samples()]
        return self._samples

    def __iter__(self) -> Statistics:
        return self

    def __next__(self) -> Group:
        try:
            return Group(**next(self._groups))
        except StopIteration:
            self._files.close()
            raise

    def close(self) -> None:
        """Ends the pass."""
        self._groups.close()
        self._files.close()

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def statistics(
    model: str | os.PathLike[str],
    calibration: Data,
    *,
    layers: Iterable[int] | None = None,
    method: str = "vlmq",
    bits: float = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    settings: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    max_tokens: int = 2048,
) -> Statistics:
    """Begins a calibration pass and gives what it sums up for each group of linears.

    The pass solves each layer as `quantize` does, since the next one sees what that gives, and writes
    nothing. It ends after the last of `layers`.

        with vlmq.statistics("model", rows, layers=[1]) as groups:
            for group in groups:
                print(group.modules, group.hessian.shape)
    """
    files = ExitStack()
    path, n = files.enter_context(samples_file(calibration, samples, seed, takes_more=False))
    try:
        groups = _vlmq.statistics(
            model=model, calibration=path, method=method, bits=f"{bits:g}", group_size=group_size,
            symmetric=symmetric, settings=assignments(settings), samples=n, seed=seed,
            max_tokens=max_tokens, layers=None if layers is None else list(layers))
    except BaseException:
        files.close()
        raise
    return Statistics(groups, files)
