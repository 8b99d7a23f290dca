"""Imports follow `import_rules.PARTS` and have no cycles; what an import loads, in a child process.

The rules are checked against the sources, without importing them.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from import_rules import IMPORT_BY_TABLE, PARTS, TOPS

import perception_rt
from perception_rt.families import FAMILIES
from perception_rt.targets import TARGETS

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Import:
    """`module` imports `target` on a line; a `lazy` import runs when a function is called."""

    module: str
    target: str
    line: int
    lazy: bool


@cache
def sources() -> dict[str, Path]:
    """Module name -> file."""
    paths = [p for top in TOPS for p in (ROOT / top).rglob("*.py")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(paths)}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text("utf-8"))


@cache
def imports() -> list[Import]:
    return [
        Import(module=module, target=target, line=line, lazy=lazy)
        for module in sources()
        for target, line, lazy in _imports(tree(module), lazy=False)
    ]


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[tuple[str, int, bool]]:
    """Yields (full name, line, lazy) of each import in a tree, also `import_module("...")`."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        # Of `from package import name`, the name may be a module.
        yield from ((f"{node.module}.{a.name}", node.lineno, lazy) for a in node.names)
    elif is_import_call(node) and isinstance(node.args[0], ast.Constant):
        yield node.args[0].value, node.lineno, lazy
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, lazy=lazy or inside)


def is_import_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
        "import_module",
        "import_named",
        "__import__",
    )


def part_of(module: str, names: Iterable[str]) -> str | None:
    """Returns the longest of `names` that is `module` or a package that contains it."""
    found = [name for name in names if f"{module}.".startswith(f"{name}.")]
    return max(found, key=len, default=None)


def violation(item: Import) -> str | None:
    """Describes an import that the table forbids; None for one that it allows."""
    owner = part_of(item.module, PARTS)
    # The entry of the whole package is only for its __init__.py.
    assert owner is not None and (owner != "perception_rt" or item.module == owner), (
        f"{item.module} has no entry in PARTS"
    )
    part = PARTS[owner]
    top = item.target.partition(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if item.target == "perception_rt":
        allowed = part.public
    elif top in TOPS:
        itself = () if owner == "perception_rt" else (owner,)
        allowed = part_of(item.target, [*itself, *part.allowed(lazy=item.lazy)]) is not None
    else:
        allowed = top in part.libraries + (part.lazy_libraries if item.lazy else ())
    when = "in a function" if item.lazy else "at import"
    return None if allowed else f"{item.module}:{item.line} imports {item.target} {when}"


def test_imports_only_go_down() -> None:
    found = imports()
    assert len(found) > 200
    assert [v for v in map(violation, found) if v is not None] == []


@pytest.mark.parametrize(
    ("module", "target", "lazy"),
    [
        ("perception_rt.runtime.load", "perception_rt.models.pe.PerceptionEncoder", True),
        ("perception_rt.runtime.load", "torch", True),
        ("perception_rt.runtime.session", "onnxruntime", False),
        ("perception_rt.processing.video", "av", False),
        ("perception_rt.package.store", "numpy", False),
        ("perception_rt.export.build", "perception_rt.runtime.load.load", False),
        ("perception_rt.limits", "perception_rt.package.manifest.Manifest", False),
        ("perception_rt.models.pe", "perception_rt.export.graph.trace.trace", False),
        ("perception_rt.runtime.load", "perception_rt.cli.main", True),
        ("perception_rt.cli", "perception_rt.runtime.load.load", False),
        ("perception_rt", "perception_rt.runtime.load.load", False),
        ("perception_rt.cli", "training.demo.digits.held_out_digits", True),
        ("training.trainer", "perception_rt.export.build.export_package", True),
        ("training.trainer", "benchmarks.flops.flops", True),
        ("training.data.loader", "training.tasks.task.Task", False),
        ("training.recipe.schema", "training.data.jsonl.read", False),
        ("training.model.lora", "training.tasks.language.LanguageTask", True),
        ("perception_rt.runtime.cache.kv_pool", "perception_rt.runtime.session.Session", False),
        ("perception_rt.runtime.cache.disk_cache", "perception_rt.runtime.generation.x", False),
        ("perception_rt.runtime.backends.tensorrt", "perception_rt.runtime.generator.x", True),
        ("perception_rt.runtime.generation.worker", "perception_rt.runtime.backends.x", True),
        ("perception_rt.runtime.generation.worker", "perception_rt.runtime.generator.x", False),
        ("perception_rt.runtime.request", "perception_rt.runtime.session.Session", False),
        ("perception_rt.runtime.embedder", "perception_rt.export.plan.ExportPlan", True),
        ("perception_rt.export.graph.trace", "perception_rt.export.components.pe.x", False),
        ("perception_rt.export.quantization.formats", "perception_rt.export.plan.Plan", False),
        ("perception_rt.export.components.pe", "perception_rt.export.backends.tensorrt.x", False),
        ("perception_rt.export.components.pe", "perception_rt.runtime.load.load", True),
        ("perception_rt.export.plan", "torch", False),
        ("benchmarks.flops", "benchmarks.encoder.runners.x", False),
        ("benchmarks.encoder.runners", "benchmarks.generation.runners.x", True),
    ],
)
def test_the_table_refuses(module: str, target: str, lazy: bool) -> None:
    assert violation(Import(module=module, target=target, line=1, lazy=lazy)) is not None


def cycles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of nodes that reach each other; a node that reaches itself only is none."""
    reached = {node: set(below) for node, below in edges.items()}
    for middle in edges:
        for below in reached.values():
            if middle in below:
                below |= reached[middle]
    groups = ({n for n in reached[node] if node in reached[n]} for node in edges)
    return sorted((set(group) for group in {*map(frozenset, groups)} if len(group) > 1), key=min)


def import_graph(folder_of: Callable[[str], str]) -> dict[str, set[str]]:
    """Importer -> imported, of imports that run when a module is imported."""
    known = sources()
    edges: dict[str, set[str]] = {folder_of(module): set() for module in known}
    for item in imports():
        target = part_of(item.target, known)
        if target is not None and not item.lazy:
            edges[folder_of(item.module)].add(folder_of(target))
    return edges


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert cycles(import_graph(lambda module: module)) == []


def test_folders_do_not_import_each_other_in_a_circle() -> None:
    """Modules beside sub-folders, such as `runtime.session`, count on their own."""
    folders = {m for m, path in sources().items() if path.name == "__init__.py"}
    parents = {folder.rpartition(".")[0] for folder in folders}

    def folder_of(module: str) -> str:
        folder = module if module in folders else module.rpartition(".")[0]
        return module if folder in parents else folder

    assert cycles(import_graph(folder_of)) == []


def test_cycles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "d"}, "e": {"f"}, "f": {"e"}}
    assert cycles(edges) == [{"a", "b", "c"}, {"e", "f"}]


def test_names_that_are_imported_from_tables_go_down() -> None:
    for target in TARGETS.values():
        assert target.session.startswith("perception_rt.runtime.backends.")
        assert not target.emitter or target.emitter.startswith("perception_rt.export.backends.")
    for family in FAMILIES.values():
        assert family.model.startswith("perception_rt.models.")
        assert family.component.startswith("perception_rt.export.components.")
        assert family.runtime.startswith("perception_rt.runtime.")
    public = {getattr(perception_rt, name) for name in perception_rt.__all__ if name[0] != "_"}
    allowed = PARTS["perception_rt"].allowed(lazy=True)
    assert all(part_of(item.__module__, allowed) for item in public)
    dynamic = {
        module
        for module in sources()
        for node in ast.walk(tree(module))
        if is_import_call(node) and not isinstance(node.args[0], ast.Constant)
    }
    assert dynamic == IMPORT_BY_TABLE


def python(code: str, *arguments: str) -> str:
    """Runs code in a child interpreter and returns its standard output."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_is_quick_and_loads_no_library() -> None:
    code = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import perception_rt
seconds = time.perf_counter() - start
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(seconds * 1e3, *sorted(tops - sys.stdlib_module_names))
"""
    runs = [python(code).split() for _ in range(5)]
    assert [tops for _, *tops in runs] == [["perception_rt"]] * 5
    assert min(float(milliseconds) for milliseconds, *_ in runs) <= 100


RUN_A_PACKAGE = """
import sys

BANNED = (
    "torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors",
    "perception_rt.export", "perception_rt.models", "perception_rt.checkpoint", "perception_rt.cli",
)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if f"{name}.".startswith(tuple(f"{banned}." for banned in BANNED)):
            raise AssertionError(f"the runtime imported {name}")

sys.meta_path.insert(0, Refuse())

import numpy as np
from perception_rt.runtime.load import load

images = [np.full((40, 30, 3), value, np.uint8) for value in (0, 100)]
with load(sys.argv[1], backend=sys.argv[2]) as engine:
    assert engine.embed_images(images).shape == (2, 32)
    assert engine.embed_texts(["a", "b", "c"]).shape == (3, 32)
    assert engine.embed_videos([np.zeros((3, 40, 30, 3), np.uint8)]).shape == (1, 32)
    assert np.allclose(engine.classify(images, ["cat", "dog"], ["a {}"]).sum(axis=1), 1)
    assert engine.features(images, 0).shape == (2, 4, 4, 64)
loaded = [name for name in sys.modules if name in BANNED]
print("loaded:", *loaded)
"""


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_the_runtime_runs_without_torch_onnx_and_the_exporter(
    tiny_package: Path, backend: str
) -> None:
    assert python(RUN_A_PACKAGE, str(tiny_package), backend) == "loaded:\n"


BANNED_MODULES = ("pickle", "marshal", "shelve", "dill", "joblib", "yaml", "jinja2", "requests")
BANNED_CALLS = ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "np.load")


def unsafe(tree: ast.AST) -> list[str]:
    """Describes constructs that can execute the content of a file (SEC-01), with their lines."""
    found = [
        (line, f"imports {name}")
        for name, line, _ in _imports(tree, lazy=False)
        if name.partition(".")[0] in BANNED_MODULES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in BANNED_CALLS:
            found.append((node.lineno, f"calls {called}"))
        if keywords.get("shell", "False") != "False" or "trust_remote_code" in keywords:
            found.append((node.lineno, f"calls {called} with shell or trust_remote_code"))
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append((node.lineno, "calls torch.load without weights_only=True"))
    return [f"line {line} {what}" for line, what in sorted(found)]


def test_the_library_never_executes_the_content_of_files() -> None:
    found = {m: unsafe(tree(m)) for m in sources() if m.startswith("perception_rt")}
    assert {m: problems for m, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import_module('jinja2')",
        "eval('1')",
        "exec(text)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "os.system('ls')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(name, trust_remote_code=False)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert len(unsafe(ast.parse(code))) == 1
