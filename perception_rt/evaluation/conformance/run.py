"""`conform`: compares a package with the library whose weights it has."""

import os
from typing import Any

from perception_rt.errors import InputError
from perception_rt.evaluation.conformance.encoder import EncoderComparison
from perception_rt.evaluation.conformance.language import LanguageComparison
from perception_rt.evaluation.conformance.library import (
    LibraryEntry,
    get_library,
    library_errors,
    open_library,
)
from perception_rt.evaluation.conformance.report import Comparison, ConformanceReport
from perception_rt.evaluation.tasks import OnProgress
from perception_rt.families import get_family
from perception_rt.package.reader import open_package
from perception_rt.runtime.embedder import Embedder
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.load import load
from perception_rt.runtime.session import AUTO, LoadedModel


def conform(
    package: str | os.PathLike[str],
    against: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    model_only: bool = False,
    backend: str = AUTO,
    threads: int | None = None,
    expect: str | None = None,
    on_progress: OnProgress | None = None,
) -> ConformanceReport:
    """Compares a package with a library's model on sample pictures and prompts, on the CPU.

    Args:
        package: folder or name of the package, as for `perception_rt.load`.
        against: "timm" or "open_clip" for an encoder, "transformers" for a language model.
        weights: folder or file that the library reads, or its name on the hub, "org/name". None
            for the released weights of the package's model, which the library downloads.
        model_only: compare the model on the package's own pixels and token ids, and leave out
            preprocessing and prompts.
        backend: as for `perception_rt.load`.
        threads: as for `perception_rt.load`.
        expect: as for `perception_rt.load`.
        on_progress: called with the noun of what is counted, the number done and the total.

    Returns:
        The comparisons and their verdict.

    Raises:
        InputError: the library does not have models of this family, or the package and the weights
            are not the same model.
        BackendError: the library is not installed or fails, or as `perception_rt.load`.
        PackageError: as `perception_rt.load`.
    """
    entry = get_library(against)
    entry.require()
    chosen = None if weights is None else os.fspath(weights)
    with load(package, backend=backend, threads=threads, expect=expect, cache=False) as engine:
        content = engine.manifest.content
        family = get_family(content.family)
        if family != entry.family:
            raise InputError(
                f"{content.name} is {family.label}; {entry.name} is for {entry.family.label}"
            )
        library, name = open_library(entry, content, chosen)
        comparison = _compare(engine, package, entry, library, threads, model_only, on_progress)
        about = {
            "name": os.fspath(package),
            "id": engine.manifest.id,
            "model": content.name,
            "precision": content.target.precision,
        }
    return ConformanceReport(
        package=about, library=entry.label, weights=name, comparison=comparison
    )


def _compare(
    engine: LoadedModel,
    path: str | os.PathLike[str],
    entry: LibraryEntry,
    library: Any,
    threads: int | None,
    model_only: bool,
    on_progress: OnProgress | None,
) -> Comparison:
    report = on_progress or (lambda *_: None)
    with library_errors(entry):
        if isinstance(engine, Embedder):
            return EncoderComparison(
                engine, library, model_only=model_only, on_progress=report
            ).run()
        assert isinstance(engine, Generator)
        with open_package(path, expect=engine.manifest.id) as package:
            return LanguageComparison(
                engine, package, library, threads=threads, model_only=model_only,
                on_progress=report,
            ).run()  # fmt: skip
