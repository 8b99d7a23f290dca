"""Computes the figures of an encoder benchmark from raw samples, and formats them as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.encoder.runners import BASELINE, Row
from benchmarks.flops import vision_flops
from benchmarks.tables import MIB, limit_lines, share, table
from benchmarks.timing import percentile
from perception_rt.config import VisionConfig

_COLUMNS = (
    "row",
    "batch",
    "p50 ms",
    "p90 ms",
    "images/s",
    "speed-up",
    "cosine",
    "peak RSS MiB",
    "share",
)

Samples = Mapping[str, Sequence[Mapping[str, Any]]]  # samples by batch, per round, by row name


def summarize(
    config: VisionConfig,
    rows: Sequence[Row],
    samples: Samples,
    limits: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One record per measured row and batch.

    A record has no `speed_up` without the baseline, and no `share` without the row's limit.

    Args:
        config: the architecture, for its arithmetic.
        rows: all rows; those without samples have no record.
        samples: for each measured row, one sample by batch per round.
        limits: measured peaks by name.
    """
    flops = vision_flops(config)
    records = []
    for row in rows:
        for batch in samples[row.name][0] if row.name in samples else ():
            parts = [sample[batch] for sample in samples[row.name]]
            pooled = _pooled(samples, row.name, batch)
            p50 = percentile(pooled, 50)
            per_second = int(batch) * 1e3 / p50
            record = {
                "row": row.name,
                "batch": int(batch),
                "p50_ms": p50,
                "p90_ms": percentile(pooled, 90),
                "images_per_s": per_second,
                "cosine": min(part["cosine"] for part in parts),
                "peak_rss_bytes": max(part["peak_rss_bytes"] for part in parts),
                "limit": row.limit,
                "ms": [part["ms"] for part in parts],
            }
            if BASELINE.name in samples:
                record["speed_up"] = percentile(_pooled(samples, BASELINE.name, batch), 50) / p50
            if row.limit in limits:
                record["share"] = per_second * flops / limits[row.limit]
            records.append(record)
    return records


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as Markdown: one table per model and a legend."""
    lines = _heading(result)
    for model in result["models"]:
        lines += [
            "",
            f"## {model['name']}, {model['gmacs']:.2f} GMACs per image",
            "",
            *table(_COLUMNS, map(_cells, model["rows"]), model["unavailable"]),
        ]
    return "\n".join([*lines, "", _LEGEND])


_LEGEND = """\
- p50, p90: time of one call, pooled over the rounds. images/s and speed-up (over PyTorch fp32 at
  the same batch) use p50.
- cosine: lowest cosine with PyTorch fp32 of any image, or of any token if the tower has no pooling.
- peak RSS: peak memory of a process that runs this row alone, including loading.
- share: 2 x multiply-accumulates of the architecture x images/s, divided by the best rate of one
  large product of the row's type in this run. Softmax, norms and, in int8 engines, fp32 attention
  take time but count little or nothing, so 100 % is out of reach.
- "engine" takes prepared pixels, as the PyTorch rows do; "embed_images" also resizes photographs.
- "-": the figure needs a row or a limit that is unavailable on this machine."""


def _heading(result: Mapping[str, Any]) -> list[str]:
    machine, settings = result["environment"], result["settings"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("perception_rt", "torch", "onnxruntime", "python")
    )
    threads = settings["threads"] or "each library's default"
    calls = f"{settings['rounds']} x {settings['repeats']}"
    return [
        f"{machine['cpu']}, {machine['cores']} cores; {versions}  ",
        f"threads: {threads}; rounds x calls: {calls}; load average: {machine['load_average']}  ",
        *limit_lines(result),
    ]


def _pooled(samples: Samples, row: str, batch: str) -> list[float]:
    return [ms for sample in samples[row] for ms in sample[batch]["ms"]]


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        record["row"],
        str(record["batch"]),
        f"{record['p50_ms']:.1f}",
        f"{record['p90_ms']:.1f}",
        f"{record['images_per_s']:.2f}",
        f"{record['speed_up']:.2f}" if "speed_up" in record else "-",
        f"{record['cosine']:.6f}",
        f"{record['peak_rss_bytes'] / MIB:,.0f}",
        share(record, "share", record["limit"]),
    )
