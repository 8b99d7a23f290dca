"""Computes the figures of a generation benchmark from raw samples, and formats them as Markdown.

Times of several rounds are pooled. A figure without a percentile is a median.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.flops import prefill_macs, vision_flops
from benchmarks.generation.runners import BASELINE, PEERS, Row
from benchmarks.tables import GIGA, MIB, limit_lines, share, table
from benchmarks.timing import percentile
from perception_rt.plm_config import PlmConfig

Samples = Sequence[Mapping[str, Any]]  # of one task, one per round
Limits = Mapping[str, float]
Record = dict[str, Any]

# Targets against transformers in bf16, on the same machine in the same run.
MAX_TOKEN_RATIO = 0.40
MIN_PREFILL_RATIO = 0.6


def photo_record(config: PlmConfig, limit: float | None, samples: Samples) -> Record:
    """Figures of a question about the photograph, asked of a generator without caches.

    Args:
        config: the architecture, for its arithmetic.
        limit: peak of the tower's type, in operations/s; None leaves `vision_share` out.
        samples: results of `scenarios.ask_about_photo`.
    """
    warm = [sample["records"]["warm"] for sample in samples]
    parts = ("ttft_ms", "preprocess_ms", "vision_ms", "prefill_ms")
    record: Record = {part: median(r[part] for r in warm) for part in parts}
    if limit is not None:
        operations = warm[0]["image_tiles"] * vision_flops(config.vision)
        record["vision_share"] = operations * 1e3 / record["vision_ms"] / limit
    return {
        "image_tiles": warm[0]["image_tiles"],
        "prompt_tokens": warm[0]["prompt_tokens"],
        "load_ms": median(sample["load_ms"] for sample in samples),
        "first_ttft_ms": median(sample["records"]["first"]["ttft_ms"] for sample in samples),
        **record,
        **_token_figures(r["token_ms"] for r in warm),
        "peak_rss_bytes": _peak(samples),
    }


def again_record(samples: Samples) -> Record:
    """Figures of a second question about a picture, from samples of `scenarios.ask_again`."""
    first, second = (
        median(sample["records"][name]["ttft_ms"] for sample in samples)
        for name in ("first", "second")
    )
    asked = samples[0]["records"]["second"]
    return {
        "image_tiles": asked["image_tiles"],
        "prompt_tokens": asked["prompt_tokens"],
        "cached_tokens": asked["cached_tokens"],
        "first_ttft_ms": first,
        "second_ttft_ms": second,
        "ratio": second / first,
        "peak_rss_bytes": _peak(samples),
    }


def lookup_records(samples: Samples) -> list[Record]:
    """Figures with and without lookup, from samples of `scenarios.ask_with_lookup`."""
    plain = median(_decode_ms(sample["records"]["plain"]) for sample in samples)
    records = []
    for name in ("prompt", "answer"):
        runs = [sample["records"][name] for sample in samples]
        took = median(map(_decode_ms, runs))
        count, steps = len(runs[0]["token_ms"]), runs[0]["steps"]
        records.append(
            {
                "searched": name,
                "tokens": count,
                "steps": steps,
                "accepted": count - steps,
                "identical": all(run["identical"] for run in runs),
                "plain_ms_per_token": plain / len(samples[0]["records"]["plain"]["token_ms"]),
                "ms_per_token": took / count,
                "speed_up": plain / took,
            }
        )
    return records


def together_records(samples: Samples) -> list[Record]:
    """Figures of concurrent requests by batch size, from samples of `scenarios.ask_together`."""
    records: list[Record] = []
    for batch in samples[0]["records"]:
        runs = [sample["records"][batch] for sample in samples]
        per_second = sum(r["tokens"] for r in runs) * 1e3 / sum(r["ms"] for r in runs)
        records.append(
            {
                "requests": int(batch),
                "tokens_per_s": per_second,
                "ms_per_step": int(batch) * 1e3 / per_second,
                "gain": per_second / records[0]["tokens_per_s"] if records else 1.0,
            }
        )
    return records


def decoder_records(config: PlmConfig, row: Row, limits: Limits, samples: Samples) -> list[Record]:
    """One record per prompt length of a row; a share whose limit is unavailable is left out."""
    records = []
    for length in samples[0]["lengths"]:
        parts = [sample["lengths"][length] for sample in samples]
        prefill = median(ms for part in parts for ms in part["prefill_ms"])
        tokens = _token_figures(part["token_ms"] for part in parts)
        operations = 2 * prefill_macs(config.decoder, int(length))
        read = samples[0]["read_bytes"]
        record = {
            "row": row.name,
            "prompt_tokens": int(length),
            "prefill_ms": prefill,
            "prefill_tokens_per_s": int(length) * 1e3 / prefill,
            "limit": row.limit,
            **tokens,
            "read_bytes": read,
            "peak_rss_bytes": _peak(samples),
        }
        if row.limit in limits:
            record["prefill_share"] = operations * 1e3 / prefill / limits[row.limit]
        if "read" in limits:
            record["read_share"] = read * 1e3 / tokens["token_p50_ms"] / limits["read"]
        records.append(record)
    return records


def ratio_records(records: Sequence[Record], engine: str) -> list[Record]:
    """Compares the engine with each peer, by prompt length.

    Args:
        records: results of `decoder_records` for all rows.
        engine: name of the engine's row.
    """
    ours = {r["prompt_tokens"]: r for r in records if r["row"] == engine}
    return [
        {
            "peer": peer["row"],
            "prompt_tokens": length,
            "token_ratio": ours[length]["token_p50_ms"] / peer["token_p50_ms"],
            "prefill_ratio": peer["prefill_ms"] / ours[length]["prefill_ms"],
        }
        for peer in records
        if peer["row"] != engine
        for length in [peer["prompt_tokens"]]
    ]


def _token_figures(runs: Iterable[Sequence[float]]) -> Record:
    """Percentiles of the pooled milliseconds per token, and tokens/s."""
    pooled = [ms for run in runs for ms in run]
    return {
        **{f"token_p{q}_ms": percentile(pooled, q) for q in (50, 90, 99)},
        "tokens_per_s": len(pooled) * 1e3 / sum(pooled),
        "tokens": len(pooled),
    }


def _decode_ms(record: Mapping[str, Any]) -> float:
    """Milliseconds from the first token to the last."""
    return sum(record["token_ms"])


def _peak(samples: Samples) -> int:
    return max(sample["peak_rss_bytes"] for sample in samples)


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as Markdown tables with a legend."""
    model = result["model"]
    source = result["weights"].get("source", "unknown")
    lines = [*_heading(result), ""]
    lines += [f"## {model['name']}, {model['precision']}; weights: {source}"]
    unavailable = dict(result["unavailable"])
    peers = {p.name: unavailable.pop(p.name) for p in PEERS if p.name in unavailable}
    decoder = result["decoder"]
    for title, columns, rows, reasons in (
        ("A photograph", *_transposed(_PHOTO, map(_photo_cells, result["photo"])), {}),
        ("A second question about it", _AGAIN, map(_again_cells, result["again"]), {}),
        ("Prompt lookup", _LOOKUP, map(_lookup_cells, result["lookup"]), {}),
        ("Concurrent requests", _TOGETHER, map(_together_cells, result["together"]), {}),
        ("The decoder alone: prompts", _PREFILL, map(_prefill_cells, decoder), peers),
        ("The decoder alone: tokens", _DECODE, map(_decode_cells, decoder), peers),
        ("The engine against its peers", _RATIO, map(_ratio_cells, result["ratios"]), {}),
    ):
        shown = list(rows)
        if shown:
            lines += ["", f"### {title}", "", *table(columns, shown, reasons)]
    for name, reason in unavailable.items():
        lines += ["", f"Unavailable: {name}: {reason}"]
    return "\n".join([*lines, "", _LEGEND])


_PHOTO = (
    "tiles", "prompt tokens", "load s", "first TTFT ms", "TTFT ms", "preprocess ms", "vision ms",
    "prefill ms", "vision share", "ms/token p50", "ms/token p90", "ms/token p99", "tokens/s",
    "peak RSS MiB",
)  # fmt: skip
_AGAIN = ("tiles", "prompt tokens", "cached", "TTFT ms", "second TTFT ms", "ratio", "peak RSS MiB")
_LOOKUP = (
    "searched text", "tokens", "steps", "accepted", "same tokens", "ms/token without", "with",
    "speed-up",
)  # fmt: skip
_TOGETHER = ("requests", "tokens/s, all", "ms/step", "gain")
_PREFILL = ("row", "prompt tokens", "prefill ms", "prompt tokens/s", "share")
_DECODE = (
    "row", "prompt tokens", "ms/token p50", "p90", "tokens/s", "weights GB", "share of read",
    "peak RSS MiB",
)  # fmt: skip
_RATIO = ("peer", "prompt tokens", "ms/token, ours / peer", "prefill speed, ours / peer")

_LEGEND = """\
Times are for batch 1, except under "concurrent requests". A figure without a percentile is a median
over the rounds.

- TTFT: time from the call to the first token. preprocess (decoding and resizing the picture,
  tokenizing), vision and prefill are parts. "first": the first request after loading, which
  opens the engines.
- tiles: number of image tiles, the thumbnail included.
- peak RSS: peak memory of a process that runs this row alone, including loading.
- ms/token: time from one token to the next.
- weights: bytes of the decoder's weights, which every token reads. share of read: that rate divided
  by the rate at which this machine sums one large array.
- share: 2 x multiply-accumulates of the architecture per second, divided by the best rate of one
  large product of the row's type in this run. Norms and softmax count nothing, and attention runs
  in float32, so 100 % is out of reach.
- prompt lookup: "prompt" searches a text that the question asks to copy, which random weights do
  not do; "answer" searches tokens that contain the whole answer, which shows the upper limit.
- concurrent requests: counts tokens while every request is decoding.
- the decoder alone: random ids, the prompt in the scheduler's chunks, greedy tokens; transformers
  without its `generate`, onnxruntime-genai with its own loop.
- "-": the figure needs a row or a limit that is unavailable on this machine."""


def _heading(result: Mapping[str, Any]) -> list[str]:
    machine, settings = result["environment"], result["settings"]
    names = ("perception_rt", "onnxruntime", "torch", *result["peers"], "python")
    versions = ", ".join(f"{name} {machine[name]}" for name in names)
    return [
        f"{machine['cpu']}, {machine['cores']} cores; {versions}  ",
        f"threads: {settings['threads']}; rounds: {settings['rounds']}; "
        f"seconds: {result['seconds']}; load average: {machine['load_average']}  ",
        *limit_lines(result),
    ]


def _transposed(
    names: Sequence[str], rows: Iterable[Sequence[str]]
) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Columns and rows of a table with one column per record, for records of many figures."""
    columns = list(rows)
    first, *rest = zip(names, *columns, strict=True)
    return first, rest if columns else []


def _photo_cells(r: Record) -> list[str]:
    times = ("first_ttft_ms", "ttft_ms", "preprocess_ms", "vision_ms", "prefill_ms")
    return [
        f"{r['image_tiles']}",
        f"{r['prompt_tokens']}",
        f"{r['load_ms'] / 1e3:.2f}",
        *(f"{r[name]:,.0f}" for name in times),
        share(r, "vision_share"),
        *(f"{r[f'token_p{q}_ms']:.1f}" for q in (50, 90, 99)),
        f"{r['tokens_per_s']:.1f}",
        f"{r['peak_rss_bytes'] / MIB:,.0f}",
    ]


def _again_cells(r: Record) -> list[str]:
    return [
        *(str(r[name]) for name in ("image_tiles", "prompt_tokens", "cached_tokens")),
        f"{r['first_ttft_ms']:,.0f}",
        f"{r['second_ttft_ms']:,.0f}",
        f"{r['ratio']:.3f}",
        f"{r['peak_rss_bytes'] / MIB:,.0f}",
    ]


def _lookup_cells(r: Record) -> list[str]:
    return [
        *(str(r[name]) for name in ("searched", "tokens", "steps", "accepted")),
        "yes" if r["identical"] else "NO",
        f"{r['plain_ms_per_token']:.1f}",
        f"{r['ms_per_token']:.1f}",
        f"{r['speed_up']:.2f}",
    ]


def _together_cells(r: Record) -> list[str]:
    return [
        str(r["requests"]),
        f"{r['tokens_per_s']:.1f}",
        f"{r['ms_per_step']:.1f}",
        f"{r['gain']:.2f}",
    ]


def _prefill_cells(r: Record) -> list[str]:
    return [
        r["row"],
        f"{r['prompt_tokens']}",
        f"{r['prefill_ms']:,.0f}",
        f"{r['prefill_tokens_per_s']:.0f}",
        share(r, "prefill_share", r["limit"]),
    ]


def _decode_cells(r: Record) -> list[str]:
    return [
        r["row"],
        f"{r['prompt_tokens']}",
        f"{r['token_p50_ms']:.1f}",
        f"{r['token_p90_ms']:.1f}",
        f"{r['tokens_per_s']:.1f}",
        f"{r['read_bytes'] / GIGA:.2f}",
        share(r, "read_share"),
        f"{r['peak_rss_bytes'] / MIB:,.0f}",
    ]


def _ratio_cells(r: Record) -> list[str]:
    tokens, prefill = f"{r['token_ratio']:.2f}", f"{r['prefill_ratio']:.2f}"
    if r["peer"] == BASELINE.name:
        tokens += f" (wanted: <= {MAX_TOKEN_RATIO:.2f})"
        prefill += f" (wanted: >= {MIN_PREFILL_RATIO:.2f})"
    return [r["peer"], str(r["prompt_tokens"]), tokens, prefill]
