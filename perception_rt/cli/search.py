"""The commands `perception-rt search` and `perception-rt index`, for results of bulk jobs."""

import argparse
import json
import sys
from typing import Any

from perception_rt.cli.arguments import CommandParser, engine_arguments, output_path
from perception_rt.errors import InputError, escaped
from perception_rt.progress import Progress


def add_search_arguments(search: CommandParser) -> None:
    """Adds the arguments of `search`."""
    search.add_argument("result", metavar="OUT", help="a result of `perception-rt embed`")
    search.add_argument("text", metavar="TEXT", nargs="?", help="what to search for")
    search.add_argument(
        "--package", metavar="DIR", help="the package that made OUT, or demo:pe, or "
        "hf:org/name@revision; it embeds the query (default: a demo, or one that was fetched from "
        "a hub, with the id in OUT)"
    )  # fmt: skip
    search.add_argument("--image", metavar="FILE", help="an image to search for")
    search.add_argument("-k", type=int, default=20, metavar="K", help="hits (default: 20)")
    search.add_argument("--html", metavar="FILE.html", help="page of the images found, to write")
    search.add_argument(
        "--column", metavar="NAME", help="column of images in Parquet files that OUT names"
    )
    kinds = search.add_mutually_exclusive_group()
    kinds.add_argument("--exact", action="store_true", help="compare every row")
    kinds.add_argument(
        "--approximate", action="store_true", help="use the index; by default it is used above a "
        "million rows"
    )  # fmt: skip
    engine_arguments(search)


def add_index_arguments(index: CommandParser) -> None:
    """Adds the arguments of `index`."""
    index.add_argument("result", metavar="OUT", help="a result of `perception-rt embed`")
    index.add_argument(
        "--queries", metavar="OUT", help="result with the queries of the recall, such as texts "
        "(default: rows of OUT)"
    )  # fmt: skip
    index.add_argument(
        "--expansion", type=int, default=128, metavar="N", help="candidates kept while a row is "
        "added or searched; more of them give a higher recall (default: 128)"
    )  # fmt: skip
    index.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads (default: one per core)"
    )


def _package_of(package_id: str) -> str | None:
    """A demo, or a package in the cache of a hub, by its id; None if it is neither."""
    from perception_rt.demo import package_paths
    from perception_rt.hub import find_cached
    from perception_rt.package.manifest import MANIFEST_FILE
    from perception_rt.package.reader import read_manifest

    for name, folder in package_paths().items():
        if (folder / MANIFEST_FILE).is_file() and read_manifest(folder).id == package_id:
            return name
    found = find_cached(package_id)
    return None if found is None else str(found)


class SearchCommand:
    """One call of `search`: checks all that needs no engine, then searches and shows.

    Raises:
        InputError: the options are unusable, or the package is not the one that made the result.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from perception_rt.bulk.result import open_result
        from perception_rt.bulk.search import check_k, check_package
        from perception_rt.hub import PREFIX
        from perception_rt.package.reader import read_manifest

        self._options = options
        self._result = open_result(options.result)
        if options.package is None:
            options.package = _package_of(self._result.package)
        if options.package is None:
            raise InputError(
                f"give --package: {options.result!r:.200} was embedded by {self._result.package} "
                f"({self._result.model})"
            )
        if options.text is None and options.image is None:
            raise InputError("nothing to search for: give TEXT, --image or both")
        check_k(options.k)
        self._page = None
        if options.html is not None:
            self._page = output_path("--html", options.html, ".html")
        if not options.package.startswith(PREFIX):  # else `embed_query` checks what was loaded
            manifest = read_manifest(options.package)
            check_package(self._result, manifest.id, manifest.content.name)

    def run(self, engine: Any, progress: Progress) -> None:
        """Searches and prints."""
        from perception_rt.bulk.index import indexed_search
        from perception_rt.bulk.rows import count_rows
        from perception_rt.bulk.search import embed_query, exact_search

        options, result = self._options, self._result
        query = embed_query(engine, result, options.text, options.image)[None]
        total = count_rows(result)
        indexed, note = self._method(total)
        if indexed:
            progress.step("searching the index")
            (hits,) = indexed_search(result, query, options.k)
        else:
            count = progress.counter("rows")
            (hits,) = exact_search(
                result, query, options.k, on_progress=lambda done: count(done, total)
            )
        method = "approximate" if indexed else "exact"
        about = f"{len(hits)} of {total:,} rows of {options.result}, {result.model}, {method}"
        if self._page is not None:
            progress.step("drawing the page")
            self._write_page(hits, about)
        progress.stop()
        self._show(hits, method, total)
        if note:
            print(escaped(note), file=sys.stderr)

    def _method(self, total: int) -> tuple[bool, str]:
        """Whether to use the index, and a hint."""
        from perception_rt.bulk.index import has_index
        from perception_rt.bulk.search import MAX_EXACT_ROWS

        if self._options.exact or total <= MAX_EXACT_ROWS:
            return self._options.approximate, ""
        if self._options.approximate or has_index(self._result):
            return True, ""
        return False, f"perception-rt index {self._options.result} would make this faster"

    def _write_page(self, hits: Any, about: str) -> None:
        from perception_rt.bulk.html_page import write_page
        from perception_rt.processing.image_options import image_options

        options = self._options
        assert self._page is not None
        write_page(
            self._page, hits, text=options.text, image=options.image, note=about,
            column=options.column, options=image_options(options.formats, options.background),
        )  # fmt: skip

    def _show(self, hits: Any, method: str, total: int) -> None:
        options = self._options
        if options.json:
            found = [{"id": hit.id, "score": hit.score, "source": hit.source} for hit in hits]
            record = {"text": options.text, "image": options.image, "method": method}
            print(json.dumps({**record, "rows": total, "hits": found}, indent=2))
            return
        for rank, hit in enumerate(hits, 1):
            print(escaped(f"{rank:>3}  {hit.score:.4f}  {hit.source}"))


def run_index(options: argparse.Namespace) -> None:
    """Builds an index and prints its recall."""
    from perception_rt.bulk.index import build_index
    from perception_rt.bulk.result import open_result
    from perception_rt.bulk.rows import count_rows
    from perception_rt.records import check_integer

    threads = check_integer("--threads", options.threads, 0, 1024)
    result = open_result(options.result)
    queries = None if options.queries is None else open_result(options.queries)
    with Progress() as progress:
        total, count = count_rows(result), progress.counter("rows")
        report = build_index(
            result, queries, expansion=options.expansion, threads=threads,
            on_progress=lambda done: count(done, total),
        )  # fmt: skip
    facts = {
        "index": str(report.path), "rows": report.rows, "size_bytes": report.size_bytes,
        "recall": report.recall, "k": report.k, "queries": report.queries,
    }  # fmt: skip
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    asked = f"rows of {options.queries or options.result}"
    print(escaped(
        f"{report.path}: {report.rows:,} rows, {report.size_bytes:,} bytes; "
        f"recall@{report.k} {report.recall:.4f} of {report.queries} {asked}"
    ))  # fmt: skip
