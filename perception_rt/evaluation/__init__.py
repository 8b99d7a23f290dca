"""Evaluation of packages: task scores with intervals, and what a precision or fine-tune costs.

```
from perception_rt.evaluation import TaskOptions, evaluate, write_report

report = evaluate("pe-int8", "zero-shot", "digits/", against="pe-fp32")
report.value("top-1")
write_report(report, Path("report.json"))
```

The names are imported on first use: the command line reads the list of tasks without NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perception_rt.evaluation.report.contents import Report
    from perception_rt.evaluation.report.output import write_report
    from perception_rt.evaluation.run import evaluate
    from perception_rt.evaluation.tasks import TaskOptions

_LAZY = {
    "Report": "perception_rt.evaluation.report.contents",
    "TaskOptions": "perception_rt.evaluation.tasks",
    "evaluate": "perception_rt.evaluation.run",
    "write_report": "perception_rt.evaluation.report.output",
}

__all__ = ["Report", "TaskOptions", "evaluate", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
