"""The command `conform`: compares a package with the library whose weights it has."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from perception_rt.cli.arguments import CommandParser
from perception_rt.errors import escaped
from perception_rt.progress import Progress

if TYPE_CHECKING:
    from perception_rt.evaluation.conformance.report import Check, ConformanceReport

LIBRARIES = ("timm", "open_clip", "transformers")


def add_conform_arguments(parser: CommandParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("package", metavar="DIR", help="an engine package, or hf:org/name@revision")
    parser.add_argument(
        "--against", required=True, choices=LIBRARIES, help="timm or open_clip for an encoder, "
        "transformers for a language model"
    )  # fmt: skip
    parser.add_argument(
        "--weights", metavar="PATH", help="folder or file that the library reads, or its name on "
        "the hub, org/name (default: the released weights, which the library downloads)"
    )  # fmt: skip
    parser.add_argument(
        "--model-only", action="store_true", help="leave out preprocessing and prompts: compare "
        "the model on equal pixels and token ids"
    )  # fmt: skip
    parser.add_argument(
        "--backend", default="auto", help="backend to run on (default: the package's own)"
    )
    parser.add_argument("--threads", type=int, help="threads per engine call")
    parser.add_argument("--expect", metavar="ID", help="refuse any other package id")


def run_conform(options: argparse.Namespace) -> int:
    """Runs the command; returns 0 if the package is faithful, else 1."""
    from perception_rt.evaluation.conformance.run import conform

    with Progress() as progress:
        progress.step(f"opening {escaped(options.package)} and {options.against}")
        report = conform(
            options.package,
            options.against,
            options.weights,
            model_only=options.model_only,
            backend=options.backend,
            threads=options.threads,
            expect=options.expect,
            on_progress=lambda noun, done, total: progress.count(
                f"comparing: {done} of {total} {noun}", done, total
            ),
        )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        for line in report_lines(report):
            print(escaped(line))
    return 0 if report.faithful else 1


def report_lines(report: "ConformanceReport") -> Iterator[str]:
    """The checks, the layers if a check failed, the notes, and the verdict last."""
    found = report.comparison
    yield f"{report.package['name']} against {report.library}, weights {report.weights}"
    for check in found.checks:
        mark = "ok" if check.passed else "DIFFERS"
        yield f"  {check.name:<30}{_figure(check):<46}{mark}"
    if found.layers:
        yield "  layers, from the input on"
        for layer in found.layers:
            yield f"    {layer}"
    for note in found.notes:
        yield f"  note: {note}"
    yield report.verdict


def _figure(check: "Check") -> str:
    from perception_rt.evaluation.conformance.report import shown_cosine

    if check.kind == "equal":
        return f"{check.value:.1%} equal"
    if check.kind == "cosine":
        return f"cosine {shown_cosine(check.value)} (at least {shown_cosine(check.limit)})"
    return f"largest difference {check.value:.3g} (at most {check.limit:.3g})"
