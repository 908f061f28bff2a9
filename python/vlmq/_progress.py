"""How far a command has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """How far a command has come."""

    what: str
    """What is counted: `layers`, `runs`, or the name of a task whose questions are."""
    n_done: int
    n: int
    stage: str | None
    """What is being done within the present one, where it has parts."""


Callback: TypeAlias = Callable[[Progress], object] | bool | None
"""Is called from the thread that gave the command, and ends it by an exception. True: a bar of tqdm."""


@contextmanager
def listener(progress: Callback) -> Iterator[Callable[[str, int, int, str | None], object] | None]:
    """What the native part is to call."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _Bar() as bar:
            yield bar.show
    else:
        yield lambda *step: progress(Progress(*step))


class _Bar:
    def __enter__(self) -> _Bar:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, what: str, n_done: int, n: int, stage: str | None) -> None:
        self._bar.total = n
        self._bar.set_description(what, refresh=False)
        self._bar.set_postfix_str(stage or "", refresh=False)
        self._bar.update(n_done - self._bar.n)
        self._bar.refresh()
