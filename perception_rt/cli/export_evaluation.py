"""`perception-export --eval-data`: scores of a package, and what its precision costs in points."""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perception_rt.cli.evaluate import counter, named_options
from perception_rt.cli.report import evaluation_lines
from perception_rt.errors import InputError
from perception_rt.families import family_of
from perception_rt.progress import Progress

if TYPE_CHECKING:
    from perception_rt.evaluation.report.contents import Run
    from perception_rt.export.build import Evaluator
    from perception_rt.export.options import ExportOptions
    from perception_rt.package.manifest import Manifest

# Options of how the engines are built, which a package in fp32 does not share.
_ENGINE_OPTIONS = (
    "target", "blocks", "allow_unfused", "refittable", "route", "calibration", "calibrator",
    "force",
)  # fmt: skip
_FP32 = "fp32"


class ExportEvaluation:
    """Evaluates the package of an export, and the same model in fp32 on ONNX Runtime.

    The package in fp32 is exported for this alone, into a temporary folder beside `--out`, and
    removed. A package that is itself in fp32 gets scores without a comparison.

    Raises:
        InputError: the task or an option is unknown, or does not suit the model.
    """

    def __init__(self, arguments: argparse.Namespace, options: "ExportOptions") -> None:
        from perception_rt.evaluation.tasks import get_task
        from perception_rt.export.architecture import find_architecture

        self._task = get_task(arguments.eval_task)
        self._task_options = named_options(arguments.eval_option)
        self._task.check(self._task_options)
        self._data = arguments.eval_data
        self._options = options
        family = family_of(find_architecture(options))
        if family != self._task.family:
            raise InputError(
                f"the model is {family.label}; --eval-task {self._task.name} is for "
                f"{self._task.family.label}"
            )
        if not Path(self._data).exists():
            raise InputError(f"--eval-data {self._data!r:.200} does not exist")

    def evaluator(self, progress: Progress) -> "Evaluator":
        """The function that `export` calls with the finished package."""
        from perception_rt.evaluation.run import make_report
        from perception_rt.export.build import export
        from perception_rt.package.reader import read_manifest

        def evaluate(folder: Path) -> Mapping[str, Any]:
            run, reference = self._run(folder, progress), None
            if read_manifest(folder).content.target.precision != _FP32:
                with tempfile.TemporaryDirectory(
                    dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
                ) as temporary:
                    out = Path(temporary) / _FP32
                    export(self._in_fp32(out), lambda line: progress.step(f"fp32: {line}"))
                    reference = self._run(out, progress)
            return make_report(self._task, self._data, run, reference).summary()

        return evaluate

    def show(self, manifest: "Manifest") -> None:
        """Prints the scores on standard error."""
        for line in evaluation_lines(manifest.record["evaluation"]):
            print(line, file=sys.stderr)

    def _run(self, folder: Path, progress: Progress) -> "Run":
        from perception_rt.evaluation.run import run_task
        from perception_rt.package.reader import read_manifest
        from perception_rt.runtime.load import load

        manifest = read_manifest(folder)
        name = manifest.content.target.precision
        # The id shows that we trust what we just made: engines are code.
        with load(folder, expect=manifest.id) as model:
            report = counter(progress, f"evaluating {name}")
            return run_task(model, self._task, self._data, self._task_options, report, name=name)

    def _in_fp32(self, out: Path) -> "ExportOptions":
        defaults: dict[str, Any] = {
            f.name: f.default for f in fields(self._options) if f.name in _ENGINE_OPTIONS
        }
        return replace(self._options, out=out, precision=_FP32, backend="onnxruntime", **defaults)
