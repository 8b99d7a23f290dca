"""Who may import whom, read from the sources; what an import loads, seen in a child process.

docs/design.md in a table: an import may only go down. `runtime` and `models` never see each other,
and nobody imports `cli`, `training` or `benchmarks`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perception_rt import _LAZY
from perception_rt.families import FAMILIES
from perception_rt.targets import TARGETS

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part of the tree may import besides itself and the standard library.

    `lazy` and `lazy_libraries` are for function bodies and for `if TYPE_CHECKING` only.
    """

    uses: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    lazy: tuple[str, ...] = ()
    lazy_libraries: tuple[str, ...] = ()


LAYER_1 = (
    "_version",
    "archs",
    "config",
    "demo",
    "errors",
    "families",
    "limits",
    "memory",
    "plm_config",
    "progress",
    "records",
    "targets",
    "tensorrt_library",
)
LAYER_2 = (*LAYER_1, "processing", "package")
TORCH_SIDE = (*LAYER_2, "models", "checkpoint")
EXPORTER = ("numpy", "torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")

# The longest name that fits a module is its part; a module that no name fits is an error.
PARTS = {
    "perception_rt": Part(uses=LAYER_1, lazy=("processing", "runtime")),
    **{f"perception_rt.{name}": Part(uses=LAYER_1) for name in LAYER_1},
    "perception_rt.tensorrt_library": Part(
        uses=LAYER_1,
        lazy_libraries=("tensorrt", "tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"),
    ),
    "perception_rt.processing": Part(
        uses=LAYER_1, libraries=("numpy", "PIL", "regex", "ftfy"),
        lazy_libraries=("av", "sentencepiece", "tiktoken", "tokenizers")
    ),
    "perception_rt.package": Part(uses=LAYER_1),
    "perception_rt.models": Part(uses=LAYER_1, libraries=("torch",)),
    "perception_rt.checkpoint": Part(
        uses=(*LAYER_1, "models", "processing"),
        libraries=("torch", "safetensors"),
        lazy_libraries=("huggingface_hub",),
    ),
    "perception_rt.runtime": Part(uses=LAYER_2, libraries=("numpy",)),
    # Decides what runs; only `model_runner` touches engines, arrays and caches of contents.
    "perception_rt.runtime.generation.scheduler": Part(
        uses=(
            *LAYER_1,
            "package",
            "runtime.cache.kv_pool",
            "runtime.generation.model_runner",
            "runtime.generation.request_state",
            "runtime.request",
        )
    ),
    "perception_rt.runtime.backends.onnxruntime": Part(
        uses=(*LAYER_2, "runtime"), libraries=("numpy", "onnxruntime")
    ),
    "perception_rt.runtime.cuda": Part(
        uses=LAYER_1, libraries=("numpy",), lazy_libraries=("cuda",)
    ),
    "perception_rt.export": Part(uses=TORCH_SIDE, libraries=EXPORTER),
    "perception_rt.export.gate": Part(
        uses=(*TORCH_SIDE, "export", "runtime"), libraries=EXPORTER
    ),
    "perception_rt.export.quantization.modelopt": Part(
        uses=LAYER_1, libraries=("torch",), lazy_libraries=("modelopt",)
    ),
    "perception_rt.export.backends.torch_tensorrt": Part(
        uses=(*TORCH_SIDE, "export"), libraries=EXPORTER, lazy_libraries=("torch_tensorrt",)
    ),
    "perception_rt.cli.report": Part(
        uses=(*LAYER_1, "package"), lazy=("runtime",), lazy_libraries=("onnxruntime",)
    ),
    "perception_rt.cli": Part(
        uses=LAYER_1,
        lazy=("cli", "export", "package", "processing", "runtime"),
        lazy_libraries=("numpy",),
    ),
    "perception_rt.__main__": Part(uses=("cli",)),
    "training": Part(
        uses=TORCH_SIDE,
        libraries=("numpy", "torch", "PIL", "safetensors", "sklearn", "yaml"),
        lazy_libraries=("matplotlib", "sentencepiece", "tensorboard", "xformers"),
    ),
}  # fmt: skip

# Modules that import by names from a table: `_LAZY`, `TARGETS` or `FAMILIES`.
IMPORT_BY_TABLE = {
    "perception_rt",
    "perception_rt.export.build",
    "perception_rt.families",
    "perception_rt.runtime.load",
    "perception_rt.runtime.session",
}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import: who, whom, where, and whether it happens only when a function is called."""

    module: str
    target: str
    line: int
    lazy: bool


def sources() -> dict[str, Path]:
    paths = [p for top in ("perception_rt", "training") for p in (ROOT / top).rglob("*.py")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(paths)}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports() -> list[Import]:
    return [
        Import(module=module, target=target, line=line, lazy=lazy)
        for module, path in sources().items()
        for target, line, lazy in _imports(ast.parse(path.read_text("utf-8")), lazy=False)
    ]


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[tuple[str, int, bool]]:
    """(full name, line, lazy) of every import below a node, `import_module("...")` included."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        # `from package import module` may name a module, `from module import name` never does.
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
    """The longest of `names` that is `module` or a package around it."""
    found = [name for name in names if f"{module}.".startswith(f"{name}.")]
    return max(found, key=len, default=None)


def violation(item: Import) -> str | None:
    """What is wrong with an import by the table, None if it is fine."""
    owner = part_of(item.module, PARTS)
    # The entry of the whole package is for its __init__.py alone.
    assert owner is not None and (owner != "perception_rt" or item.module == owner), (
        f"{item.module} has no entry in PARTS"
    )
    part = PARTS[owner]
    top = item.target.partition(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top in ("perception_rt", "training"):
        below = part.uses + (part.lazy if item.lazy else ())
        itself = () if owner == "perception_rt" else (owner,)
        allowed = part_of(item.target, [*itself, *(f"perception_rt.{n}" for n in below)])
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
    ],
)
def test_the_table_refuses(module: str, target: str, lazy: bool) -> None:
    assert violation(Import(module=module, target=target, line=1, lazy=lazy)) is not None


def test_names_that_are_imported_from_tables_go_down() -> None:
    for target in TARGETS.values():
        assert target.session.startswith("perception_rt.runtime.backends.")
        assert not target.emitter or target.emitter.startswith("perception_rt.export.backends.")
    for family in FAMILIES.values():
        assert family.model.startswith("perception_rt.models.")
        assert family.component.startswith("perception_rt.export.components.")
        assert family.runtime.startswith("perception_rt.runtime.")
    lazy = [f"perception_rt.{name}" for name in PARTS["perception_rt"].lazy]
    assert all(name.startswith(tuple(lazy)) for name in _LAZY.values())
    dynamic = {
        module
        for module, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if is_import_call(node) and not isinstance(node.args[0], ast.Constant)
    }
    assert dynamic == IMPORT_BY_TABLE


def python(code: str, *arguments: str) -> str:
    """Standard output of a child interpreter; its standard error is in the failure."""
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
    """Constructs that can run what a file says (SEC-01), with their lines."""
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


def test_nothing_in_the_library_can_run_what_a_file_says() -> None:
    modules = {m: p for m, p in sources().items() if m.startswith("perception_rt")}
    found = {m: unsafe(ast.parse(p.read_text("utf-8"))) for m, p in modules.items()}
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
