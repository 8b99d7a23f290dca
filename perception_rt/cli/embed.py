"""The command `perception-rt embed`: a few items in memory, or a bulk job into a result on disk."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from perception_rt.cli.arguments import CommandParser, list_argument, package_arguments
from perception_rt.errors import InputError, escaped
from perception_rt.progress import Progress, width

MAX_TABLE = 20  # items of a table of cosines
MAX_IN_MEMORY = 1000  # items of files and folders without --out
_NAME_COLUMNS = 40
_SKIPPED = 1  # exit status of a job that left items out


def add_embed_arguments(embed: CommandParser) -> None:
    """Adds the arguments of the command."""
    package_arguments(embed)
    embed.add_argument(
        "sources", metavar="SOURCE", nargs="*", default=[], help="file, folder, quoted glob, "
        "webdataset .tar or .tar.gz, .parquet, or .txt or .jsonl of texts"
    )  # fmt: skip
    list_argument(embed, "--image", "FILE")
    list_argument(embed, "--text", "TEXT")
    list_argument(embed, "--video", "FILE")
    embed.add_argument(
        "--from", action="append", default=[], metavar="LIST", help="file of paths, one per line, "
        "or - for standard input; may be repeated"
    )  # fmt: skip
    embed.add_argument(
        "--column", metavar="NAME", help="column of Parquet files with bytes or paths, or field of "
        ".jsonl lines"
    )  # fmt: skip
    embed.add_argument("--num-frames", type=int, default=8, help="frames per video (default: 8)")
    embed.add_argument(
        "--out", metavar="OUT", help=".npy, .jsonl or .parquet file, or a folder of Parquet shards"
    )
    embed.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the rows in OUT"
    )
    embed.add_argument("--resume", action="store_true", help="complete what is missing in OUT")
    embed.add_argument(
        "--skip-errors", action="store_true", help="record unusable items in errors.jsonl and go "
        "on; the exit status is then 1"
    )  # fmt: skip
    embed.add_argument(
        "--part", metavar="I/N", help="only part I of N of the items, into the same folder OUT"
    )
    embed.add_argument("--shard-size", type=int, metavar="N", help="items per shard (1024)")
    embed.add_argument("--batch-size", type=int, metavar="N", help="items per engine call")
    embed.add_argument("--workers", type=int, metavar="N", help="threads that decode images")
    embed.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS", help="run the job on a Ray cluster: "
        "the one of this machine, or ADDRESS, or local for a new one here"
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A few embedded items."""

    names: Sequence[str]
    rows: Any


class EmbedCommand:
    """One call of the command: checks the options, runs, and shows the result.

    Raises:
        InputError: the options exclude each other, or OUT has a suffix of no known kind.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._lists = getattr(options, "from")
        self._part = _part(options.part)
        flags = {
            "--resume": options.resume,
            "--skip-errors": options.skip_errors,
            "--part": options.part is not None,
            "--shard-size": options.shard_size is not None,
            "--ray": options.ray is not None,
        }
        given = [name for name, value in flags.items() if value]
        listed = options.sources or self._lists
        if not listed and not options.image + options.text + options.video:
            raise InputError("nothing to embed: give SOURCE, --from, --image, --text or --video")
        if given and options.out is None:
            raise InputError(f"{given[0]} needs --out")
        self._kind = "" if options.out is None else _kind(options.out)
        # As before there were bulk jobs: these files are replaced, and need no pyarrow.
        self._bulk = options.out is not None and bool(listed or given or self._kind != ".npy")

    def run(self, engine: Any, progress: Progress) -> int:
        """Embeds, writes and prints; returns the exit status."""
        if self._bulk:
            from perception_rt.bulk.run import embed_sources

            return self._run_bulk(progress, partial(embed_sources, engine))
        if self._options.sources or self._lists:
            found = self._embed_listed(engine, progress)
        else:
            found = self._embed_named(engine, progress)
        progress.stop()
        if self._options.out is not None:
            self._save(engine, found)
        self._show(found)
        return 0

    def _embed_named(self, engine: Any, progress: Progress) -> _Rows:
        """Items of --image, --text and --video."""
        import numpy as np

        options, parts = self._options, []
        more = {"batch_size": options.batch_size}
        if options.image:
            parts.append(
                engine.embed_images(
                    options.image,
                    workers=options.workers,
                    on_progress=progress.counter("images"),
                    **more,
                )
            )
        if options.text:
            count = progress.counter("texts")
            parts.append(engine.embed_texts(options.text, on_progress=count, **more))
        if options.video:
            parts.append(
                engine.embed_videos(
                    options.video,
                    num_frames=options.num_frames,
                    on_progress=progress.counter("videos"),
                    **more,
                )
            )
        names = [*options.image, *options.text, *options.video]
        return _Rows(names=names, rows=np.concatenate(parts))

    def _embed_listed(self, engine: Any, progress: Progress) -> _Rows:
        """Items of files and folders, without --out."""
        from perception_rt.bulk.contents import Contents
        from perception_rt.bulk.listing import Listing
        from perception_rt.bulk.run import embed_shard, make_job

        sources, options = self._sources(), self._bulk_options()
        progress.step("listing items")
        with Listing(sources.items()) as listing, Contents(sources.column) as contents:
            total = len(listing)
            if total > MAX_IN_MEMORY:
                raise InputError(f"{total} items: give --out for more than {MAX_IN_MEMORY}")
            if not total:
                raise InputError("nothing to embed: the sources have no items")
            job = make_job(engine, listing, options, None)
            items = listing.read(0, total)
            count = progress.counter("items")

            def report(done: int, _: int) -> None:
                count(done, total)

            shard = embed_shard(engine, contents, items, 0, job, options, on_batch=report)
        return _Rows(names=shard.sources, rows=shard.rows)

    @property
    def on_cluster(self) -> bool:
        """Whether the job runs on a cluster, by `run_on_cluster`."""
        return self._options.ray is not None

    def run_on_cluster(self, progress: Progress) -> int:
        """As `run`, by the workers of a cluster."""
        from perception_rt.ray.job import embed_sources

        options = self._options
        load = {
            "backend": options.backend,
            "device": options.device,
            "threads": options.threads,
            "expect": options.expect,
            "formats": options.formats,
            "background": options.background,
        }

        def embed(*arguments: Any, **more: Any) -> Any:
            with redirect_stdout(sys.stderr):  # Ray prints there when a worker dies
                return embed_sources(
                    options.package, *arguments, address=options.ray, load=load, **more
                )

        return self._run_bulk(progress, embed)

    def _run_bulk(self, progress: Progress, embed: Callable[..., Any]) -> int:
        """Runs a job by a function that takes sources, output and options."""
        from perception_rt.bulk.output import Output

        options = self._options
        progress.step("listing items")

        def count(done: int, total: int, errors: int) -> None:
            failed = f", {_errors(errors)}" if errors else ""
            progress.count(f"{done:,} of {total:,} items{failed}", done, total)

        totals = embed(self._sources(), options.out, self._bulk_options(), on_progress=count)
        progress.stop()
        errors_file = str(_errors_path(options.out)) if totals.errors else None
        dim = (Output(options.out).recorded() or {})["dim"]
        if options.json:
            _print_json({
                "out": options.out, "count": totals.items, "rows": totals.rows,
                "errors": totals.errors, "errors_file": errors_file, "dim": dim,
            })  # fmt: skip
        else:
            line = f"{options.out}: {totals.rows:,} rows of {dim} {options.dtype}"
            if errors_file is not None:
                line += f"; {_errors(totals.errors)} in {errors_file}"
            print(escaped(line))
            if self._part is None and 0 < totals.rows <= MAX_TABLE:
                self._show(_read(options.out))
        return _SKIPPED if totals.errors else 0

    def _sources(self) -> Any:
        from perception_rt.bulk.sources import Sources

        options = self._options
        return Sources(
            paths=tuple(options.sources),
            lists=tuple(sys.stdin.buffer if name == "-" else name for name in self._lists),
            images=tuple(options.image),
            texts=tuple(options.text),
            videos=tuple(options.video),
            column=options.column,
            formats=tuple(filter(None, options.formats.split(","))),
        )

    def _bulk_options(self) -> Any:
        from perception_rt.bulk.run import BulkOptions

        options = self._options
        settings = {
            "formats": sorted(filter(None, options.formats.split(","))),
            "background": options.background,
            "column": options.column,
        }
        return BulkOptions(
            dtype=options.dtype,
            skip_errors=options.skip_errors,
            resume=options.resume,
            part=self._part,
            shard_items=options.shard_size,
            batch_size=options.batch_size,
            workers=options.workers,
            num_frames=options.num_frames,
            preprocessing=json.dumps(settings),
        )

    def _save(self, engine: Any, found: _Rows) -> None:
        """Writes a `.npy` result of items in memory; replaces an earlier one."""
        import numpy as np

        from perception_rt.bulk.result import write_result
        from perception_rt.bulk.shards import Shard

        count, dtype = len(found.names), self._options.dtype
        shard = Shard(
            start=0, stop=count, ids=np.arange(count), sources=found.names,
            rows=found.rows.astype(dtype),
        )  # fmt: skip
        origin = {
            "package": engine.manifest.id, "model": engine.manifest.content.name,
            "dim": engine.dim, "dtype": dtype,
        }  # fmt: skip
        write_result(Path(self._options.out), [shard], count, origin)

    def _show(self, found: _Rows) -> None:
        options = self._options
        if options.json:
            vectors = None if options.out is not None else found.rows.tolist()
            _print_json(
                {"items": list(found.names), "dim": found.rows.shape[1], "embeddings": vectors}
            )
        elif len(found.names) <= MAX_TABLE:
            print("\n".join(cosine_table(found.names, found.rows)))
        else:
            print(f"{len(found.names):,} items, dim {found.rows.shape[1]}")


def cosine_table(names: Sequence[str], rows: Any) -> list[str]:
    """Lines of a table with the cosines of all pairs of items.

    Args:
        names: N names.
        rows: unit rows (N, D).
    """
    rows = rows.astype("float32")
    cosines = rows @ rows.T
    shown = [_shortened(name) for name in names]
    columns = max(map(width, shown))
    head = "".join(f"{number:>8}" for number in range(1, len(names) + 1))
    lines = [f"{len(names)} items, dim {rows.shape[1]}, cosines", f"{'':{columns + 4}}{head}"]
    for number, (name, row) in enumerate(zip(shown, cosines, strict=True), 1):
        padding = " " * (columns - width(name))
        values = "".join(f"{cosine:8.3f}" for cosine in row)
        lines.append(f"{number:>2}  {name}{padding}{values}")
    return lines


def _shortened(name: str) -> str:
    """The end of a name, which tells files of one folder apart."""
    name = escaped(name)
    if width(name) <= _NAME_COLUMNS:
        return name
    while width(name) > _NAME_COLUMNS - 3:
        name = name[1:]
    return f"...{name}"


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise InputError(f"--part must be I/N with I from 1 to N, such as 3/8, not {text!r:.40}")
    return int(number), int(parts)


def _kind(out: str) -> str:
    from perception_rt.bulk.output import output_kind

    path = Path(out)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {out!r:.80}: its folder is missing")
    return output_kind(path, out)


def _errors(count: int) -> str:
    return "1 error" if count == 1 else f"{count:,} errors"


def _errors_path(out: str) -> Path:
    from perception_rt.bulk.output import Output

    return Output(out).errors_path


def _read(out: str) -> _Rows:
    import numpy as np

    from perception_rt.bulk.result import open_result

    blocks = list(open_result(out).blocks())
    names = [name for _, names, _ in blocks for name in names]
    return _Rows(names=names, rows=np.concatenate([rows for _, _, rows in blocks]))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
