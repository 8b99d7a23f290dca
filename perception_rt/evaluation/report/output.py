"""Writes a report as a JSON file with pictures beside it."""

import json
import re
from pathlib import Path

from perception_rt.bulk.atomic import write_bytes
from perception_rt.evaluation.report.contents import Report
from perception_rt.evaluation.report.pictures import draw_pictures


def write_report(report: Report, out: Path) -> list[Path]:
    """Writes a report and its pictures, each whole or not at all.

    Args:
        report: the report.
        out: the JSON file; pictures are beside it, with names that begin like its own.

    Returns:
        The files, the report first.
    """
    names = []
    for part in report.parts:
        stem = "-".join(filter(None, [out.stem, re.sub(r"[^a-z0-9]+", "-", part.name.lower())]))
        for kind, data in draw_pictures(report, part):
            names.append(f"{stem}-{kind}.png")
            write_bytes(out.with_name(names[-1]), data)
    text = json.dumps(report.to_dict(names), indent=1, allow_nan=False)
    write_bytes(out, text.encode("ascii") + b"\n")
    return [out, *(out.with_name(name) for name in names)]
