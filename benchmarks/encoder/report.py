"""Figures of a finished benchmark, from raw samples, and the Markdown that shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.encoder.runners import BASELINE, Row
from benchmarks.flops import vision_flops
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
_GIGA = 1e9
_MIB = 1024 * 1024


def summarize(
    config: VisionConfig,
    rows: Sequence[Row],
    rounds: Sequence[Mapping[str, Mapping[str, Any]]],
    limits: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One record per row and batch.

    Args:
        config: the architecture, for its arithmetic.
        rows: what ran, the baseline among it.
        rounds: for each round, samples by row name and batch.
        limits: measured peaks, as `machine.limits` gives them.
    """
    flops = vision_flops(config)
    baseline = {
        batch: percentile(_pooled(rounds, BASELINE.name, batch), 50)
        for batch in rounds[0][BASELINE.name]
    }
    records = []
    for row in rows:
        for batch in rounds[0][row.name]:
            parts = [samples[row.name][batch] for samples in rounds]
            pooled = _pooled(rounds, row.name, batch)
            p50 = percentile(pooled, 50)
            per_second = int(batch) * 1e3 / p50
            records.append(
                {
                    "row": row.name,
                    "batch": int(batch),
                    "p50_ms": p50,
                    "p90_ms": percentile(pooled, 90),
                    "images_per_s": per_second,
                    "speed_up": baseline[batch] / p50,
                    "cosine": min(part["cosine"] for part in parts),
                    "peak_rss_bytes": max(part["peak_rss_bytes"] for part in parts),
                    "limit": row.limit,
                    "share": per_second * flops / limits[row.limit],
                    "ms": [part["ms"] for part in parts],
                }
            )
    return records


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as Markdown tables, one per model, with what they mean."""
    lines = _heading(result)
    for model in result["models"]:
        lines += [
            "",
            f"## {model['name']}, {model['gmacs']:.2f} GMACs per image",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            f"|---{'|---:' * (len(_COLUMNS) - 1)}|",
            *(_line(record) for record in model["rows"]),
        ]
    return "\n".join([*lines, "", _LEGEND])


_LEGEND = """\
p50, p90: of one call, pooled over the rounds. images/s and speed-up (over PyTorch fp32 at the same
batch) are of p50. cosine: the least of any image, or of any token of a tower without pooling,
against PyTorch fp32.
peak RSS: of a process that does this row alone, loading included.
share: 2 x multiply-accumulates of the architecture x images/s, over the best rate that one large
product of the row's type reached in this run. Softmax, norms and, in int8 engines, fp32 attention
take time but count little or nothing, so 100 % is out of reach.
"engine" runs on prepared pixels, as the PyTorch rows do; "embed_images" resizes photographs too."""


def _heading(result: Mapping[str, Any]) -> list[str]:
    machine, limits, settings = (result[key] for key in ("environment", "limits", "settings"))
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("perception_rt", "torch", "onnxruntime", "python")
    )
    rates = ", ".join(f"{name} {limits[name] / _GIGA:,.0f}" for name in ("fp32", "bf16", "int8"))
    threads = settings["threads"] or "each library's default"
    calls = f"{settings['rounds']} x {settings['repeats']}"
    trial = " (a quick trial: small operands)" if settings["quick"] else ""
    return [
        f"{machine['cpu']}, {machine['cores']} cores; {versions}  ",
        f"threads: {threads}; rounds x calls: {calls}; load average: {machine['load_average']}  ",
        f"measured limits{trial}: {rates} GFLOP/s; read {limits['read'] / _GIGA:.1f} GB/s",
    ]


def _pooled(rounds: Sequence[Mapping[str, Mapping[str, Any]]], row: str, batch: str) -> list[float]:
    return [ms for samples in rounds for ms in samples[row][batch]["ms"]]


def _line(record: Mapping[str, Any]) -> str:
    cells = (
        record["row"],
        str(record["batch"]),
        f"{record['p50_ms']:.1f}",
        f"{record['p90_ms']:.1f}",
        f"{record['images_per_s']:.2f}",
        f"{record['speed_up']:.2f}",
        f"{record['cosine']:.6f}",
        f"{record['peak_rss_bytes'] / _MIB:,.0f}",
        f"{record['share']:.0%} {record['limit']}",
    )
    return f"| {' | '.join(cells)} |"
