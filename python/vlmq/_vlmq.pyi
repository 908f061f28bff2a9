"""The native part; see the functions of the package that call it."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

__all__ = ["Groups", "__version__", "call", "choose", "main", "statistics"]

__version__: str

@final
class Groups(Iterator[dict[str, Any]]):
    def __iter__(self) -> Groups: ...
    def __next__(self) -> dict[str, Any]: ...
    def samples(self) -> list[dict[str, Any]]: ...
    def close(self) -> None: ...

def call(
    words: Sequence[str],
    progress: Callable[[str, int, int, str | None], object] | None,
) -> tuple[str | None, str, bool]: ...
def choose(n_rows: int, n: int, seed: int) -> list[int]: ...
def main(words: Sequence[str]) -> int: ...
def statistics(
    *,
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    method: str,
    bits: str,
    group_size: int | None,
    symmetric: bool,
    settings: list[str],
    samples: int,
    seed: int,
    max_tokens: int,
    layers: list[int] | None,
) -> Groups: ...
