"""Post-training quantization of vision-language models with importance-weighted Hessians.

    import vlmq

    vlmq.quantize("Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-3B-3bit", calibration=rows, bits=3)
    vlmq.evaluate("Qwen2.5-VL-3B-3bit", {"docvqa": "DocVQA/"}, reference="Qwen2.5-VL-3B-Instruct")

Functions are the program's commands: they take its flags as arguments and return the object that it
prints with `--json`. They work without Python's lock, end at Ctrl-C, and raise `Error` where the program
prints one. What is left of a run that was ended is gone on with when it is called again.

`statistics` gives what a calibration pass sums up, Hessians and importance factors, as numpy arrays.
"""

import os as _os


def _n_cores() -> int:
    """Those that this process may use; what would be found by itself."""
    if hasattr(_os, "sched_getaffinity"):
        return len(_os.sched_getaffinity(0))
    return _os.cpu_count() or 1


# candle's own threads would stand beside those that work on samples, one each; it has no other switch.
_os.environ.setdefault("CANDLE_NUM_THREADS", "1")
# It reads all of /proc/cpuinfo at each product unless this is set.
_os.environ.setdefault("RAYON_NUM_THREADS", str(_n_cores()))

from ._commands import (calibrate, compare, evaluate, export, generate, inspect, merge, pad, plan, quantize,
                        report, rotate, score, verify)
from ._error import Error
from ._progress import Progress
from ._statistics import Group, Sample, Statistics, statistics
from ._vlmq import __version__

__all__ = [
    "Error", "Group", "Progress", "Sample", "Statistics", "__version__", "calibrate", "compare", "evaluate",
    "export", "generate", "inspect", "merge", "pad", "plan", "quantize",
    "report", "rotate", "score", "statistics", "verify",
]
