"""The table of docs/design.md: what each part of the tree may import.

An import may only go down. `runtime` and `models` never import each other, and nothing imports
`cli` or `benchmarks`. The sub-packages of `runtime`, `export` and `training` have layers too.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """Modules and libraries that a part of the tree may import besides itself.

    The standard library is always allowed. Names are below `perception_rt`, or begin with
    `training` or `benchmarks`. `lazy` and `lazy_libraries` are for function bodies and for
    `if TYPE_CHECKING` only. `public` allows `import perception_rt`, as users write it.
    """

    uses: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    lazy: tuple[str, ...] = ()
    lazy_libraries: tuple[str, ...] = ()
    public: bool = False

    def allowed(self, *, lazy: bool) -> list[str]:
        """Full names of modules and packages that may be imported."""
        names = self.uses + (self.lazy if lazy else ())
        return [n if n.partition(".")[0] in TOPS else f"perception_rt.{n}" for n in names]


TOPS = ("perception_rt", "training", "benchmarks")
LAYER_1 = (
    "_version",
    "archs",
    "config",
    "cores",
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
LAYER_2 = (*LAYER_1, "processing", "package", "native")
TORCH_SIDE = (*LAYER_2, "models", "checkpoint")
PLAN = ("export.architecture", "export.options", "export.plan", "export.quantization")
EXPORTER = ("numpy", "torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")
RECIPE = ("training.recipe",)
SHARED_BY_BENCHMARKS = (
    "benchmarks.flops",
    "benchmarks.limits",
    "benchmarks.machine",
    "benchmarks.rounds",
    "benchmarks.subprocess_task",
    "benchmarks.tables",
    "benchmarks.timing",
)

_FOUNDATION = {
    "perception_rt": Part(uses=LAYER_1, lazy=("processing", "runtime")),
    **{f"perception_rt.{name}": Part(uses=LAYER_1) for name in LAYER_1},
    "perception_rt.tensorrt_library": Part(
        uses=LAYER_1,
        lazy_libraries=("tensorrt", "tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"),
    ),
    "perception_rt.processing": Part(
        uses=LAYER_1,
        libraries=("numpy", "PIL", "regex", "ftfy"),
        lazy_libraries=("av", "pillow_heif", "sentencepiece", "tiktoken", "tokenizers"),
    ),
    "perception_rt.package": Part(uses=LAYER_1),
    "perception_rt.native": Part(uses=LAYER_1),
    "perception_rt.native.wheel_hook": Part(libraries=("hatchling",), lazy=("native",)),
    # Above the runtime; `package.names` finds it by name when a package on a hub is named.
    "perception_rt.hub": Part(uses=(*LAYER_1, "package"), lazy_libraries=("huggingface_hub",)),
    "perception_rt.models": Part(uses=LAYER_1, libraries=("torch",)),
    "perception_rt.checkpoint": Part(
        uses=(*LAYER_1, "models", "processing"),
        libraries=("torch", "safetensors"),
        lazy_libraries=("huggingface_hub",),
    ),
}

_RUNTIME = {
    "perception_rt.runtime": Part(uses=LAYER_2, libraries=("numpy",)),
    "perception_rt.runtime.cuda": Part(
        uses=LAYER_1, libraries=("numpy",), lazy_libraries=("cuda",)
    ),
    "perception_rt.runtime.native_calls": Part(uses=LAYER_1),
    "perception_rt.runtime.request": Part(uses=LAYER_2, libraries=("numpy",)),
    "perception_rt.runtime.embedding": Part(
        uses=(*LAYER_2, "runtime.native_calls", "runtime.session"), libraries=("numpy",)
    ),
    "perception_rt.runtime.load_options": Part(
        uses=(*LAYER_2, "runtime.request", "runtime.session")
    ),
    "perception_rt.runtime.session": Part(
        uses=(*LAYER_2, "runtime.cache", "runtime.cuda", "runtime.native_calls"),
        libraries=("numpy",),
    ),
    "perception_rt.runtime.cache": Part(
        uses=(*LAYER_1, "package", "runtime.cuda"), libraries=("numpy",)
    ),
    "perception_rt.runtime.generation": Part(
        uses=(
            *LAYER_2,
            "runtime.cache",
            "runtime.load_options",
            "runtime.native_calls",
            "runtime.request",
            "runtime.session",
        ),
        libraries=("numpy",),
    ),
    "perception_rt.runtime.generation.messages": Part(uses=(*LAYER_2, "runtime.request")),
    "perception_rt.runtime.generation.json_closer": Part(libraries=("numpy",)),
    "perception_rt.runtime.generation.constraint": Part(
        uses=(*LAYER_1, "processing", "runtime.generation.json_closer", "runtime.request"),
        libraries=("numpy",),
        lazy_libraries=("llguidance",),
    ),
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
    "perception_rt.runtime.backends": Part(
        uses=(*LAYER_1, "package", "runtime.cache", "runtime.cuda", "runtime.session"),
        libraries=("numpy",),
    ),
    "perception_rt.runtime.backends.native": Part(
        uses=(*LAYER_2, "runtime.session"), libraries=("numpy",)
    ),
    "perception_rt.runtime.backends.onnxruntime": Part(
        uses=(
            *LAYER_1,
            "package",
            "runtime.backends.onnx_weights",
            "runtime.cache",
            "runtime.cuda",
            "runtime.session",
        ),
        libraries=("numpy", "onnxruntime"),
    ),
}

_EXPORT = {
    "perception_rt.export": Part(uses=TORCH_SIDE, libraries=EXPORTER),
    "perception_rt.export.options": Part(uses=LAYER_1),
    "perception_rt.export.architecture": Part(uses=(*LAYER_2, "checkpoint", "export.options")),
    "perception_rt.export.plan": Part(
        uses=(*LAYER_2, "export.architecture", "export.options", "export.quantization")
    ),
    "perception_rt.export.fidelity": Part(uses=LAYER_2, libraries=("numpy",)),
    "perception_rt.export.gate": Part(uses=(*TORCH_SIDE, "export", "runtime"), libraries=EXPORTER),
    "perception_rt.export.quantization": Part(
        uses=(*LAYER_1, "processing"), libraries=("numpy", "torch", "ml_dtypes")
    ),
    "perception_rt.export.quantization.modelopt": Part(
        uses=LAYER_1, libraries=("torch",), lazy_libraries=("modelopt",)
    ),
    "perception_rt.export.graph": Part(
        uses=(*LAYER_1, "models", "package", "export.quantization"), libraries=EXPORTER
    ),
    "perception_rt.export.components": Part(
        uses=(*TORCH_SIDE, *PLAN, "export.fidelity", "export.graph"), libraries=("numpy", "torch")
    ),
    "perception_rt.export.backends": Part(
        uses=(*LAYER_2, *PLAN, "export.graph"), libraries=EXPORTER
    ),
    "perception_rt.export.backends.native": Part(
        uses=(*LAYER_2, *PLAN, "export.components", "export.graph"), libraries=EXPORTER
    ),
    "perception_rt.export.backends.torch_tensorrt": Part(
        uses=(*LAYER_2, *PLAN, "export.backends", "export.graph"),
        libraries=EXPORTER,
        lazy_libraries=("torch_tensorrt",),
    ),
}

_SERVE = {
    "perception_rt.serve": Part(
        uses=(*LAYER_2, "runtime"),
        libraries=("h11", "numpy", "PIL", "prometheus_client", "starlette", "uvicorn"),
        lazy=("serve",),
    ),
}

_RAY = {
    "perception_rt.ray": Part(
        uses=(*LAYER_2, "bulk", "runtime"),
        libraries=("numpy",),
        lazy=("serve",),
        lazy_libraries=("ray",),
    ),
}

_EVALUATION = {
    # A probe is trained with torch; other libraries are compared with.
    "perception_rt.evaluation": Part(
        uses=(*LAYER_2, "bulk", "runtime"),
        libraries=("numpy", "PIL"),
        lazy_libraries=("torch",),
    ),
    # Each of these is imported by its harness, in an environment that has it.
    "perception_rt.evaluation.harness": Part(lazy_libraries=("lmms_eval",)),
    "perception_rt.evaluation.harness.lmms_eval": Part(
        uses=(*LAYER_1, "bulk.sources", "runtime"),
        libraries=("numpy", "PIL", "lmms_eval", "tqdm"),
    ),
    "perception_rt.evaluation.harness.clip_benchmark": Part(
        uses=(*LAYER_2, "runtime"), libraries=("PIL", "clip_benchmark", "torch")
    ),
    "perception_rt.evaluation.harness.mteb": Part(
        uses=(*LAYER_1, "runtime"), libraries=("numpy", "mteb", "torch")
    ),
    # Compares with other libraries, so it loads them.
    "perception_rt.evaluation.conformance": Part(
        uses=(
            *LAYER_2,
            "checkpoint.timm_encoder",
            "evaluation.tasks",
            "export.fidelity",
            "runtime",
        ),
        libraries=("numpy", "PIL"),
        lazy_libraries=("open_clip", "timm", "torch", "transformers"),
    ),
}

_COMMANDS = {
    "perception_rt.bulk": Part(
        uses=LAYER_2, libraries=("numpy",), lazy=("runtime",), lazy_libraries=("pyarrow", "usearch")
    ),
    "perception_rt.cli": Part(
        uses=LAYER_1,
        lazy=(
            "bulk",
            "cli",
            "evaluation",
            "export",
            "hub",
            "package",
            "processing",
            "ray",
            "runtime",
        ),
        lazy_libraries=("numpy", "PIL"),
    ),
    "perception_rt.cli.serve": Part(
        uses=(*LAYER_1, "cli.arguments"),
        lazy=("serve",),
        lazy_libraries=("prometheus_client", "starlette", "uvicorn"),
    ),
    "perception_rt.cli.models": Part(uses=LAYER_1, lazy=("checkpoint", "export")),
    "perception_rt.cli.report": Part(
        uses=(*LAYER_1, "package"), lazy=("native", "runtime"), lazy_libraries=("onnxruntime",)
    ),
    "perception_rt.__main__": Part(uses=("cli",)),
}

_TRAINING = {
    "training": Part(
        uses=TORCH_SIDE,
        libraries=("numpy", "torch", "yaml"),
        lazy_libraries=("matplotlib", "tensorboard"),
    ),
    "training.arguments": Part(uses=LAYER_1),
    "training.atomic_files": Part(),
    "training.signals": Part(),
    "training.distributed": Part(uses=(*LAYER_1, *RECIPE), libraries=("torch",)),
    "training.recipe": Part(uses=(*LAYER_1, "processing"), libraries=("yaml",)),
    "training.data": Part(
        uses=(*LAYER_2, *RECIPE, "training.distributed"),
        libraries=("numpy", "torch", "PIL"),
        lazy_libraries=("torchcodec",),
    ),
    "training.model": Part(
        uses=(*TORCH_SIDE, *RECIPE, "training.atomic_files"),
        libraries=("torch",),
        lazy_libraries=("xformers",),
    ),
    "training.demo": Part(
        uses=(*TORCH_SIDE, *RECIPE, "training.data", "training.model"),
        libraries=("numpy", "torch", "PIL", "sklearn"),
        lazy_libraries=("sentencepiece",),
    ),
    "training.tasks": Part(
        uses=(
            *TORCH_SIDE,
            *RECIPE,
            "training.data",
            "training.demo",
            "training.distributed",
            "training.model",
        ),
        libraries=("numpy", "torch"),
    ),
    "training.planning": Part(
        uses=(*LAYER_1, *RECIPE, "models", "training.model", "training.tasks"),
        libraries=("torch",),
    ),
    "training.checkpoint": Part(
        uses=(
            *LAYER_1,
            *RECIPE,
            "training.atomic_files",
            "training.data.loader",
            "training.distributed",
            "training.tasks.task",
        ),
        libraries=("torch", "safetensors"),
    ),
}

_BENCHMARKED = Part(
    uses=(
        *TORCH_SIDE,
        *SHARED_BY_BENCHMARKS,
        "bulk",
        "export",
        "runtime",
        "training.arguments",
        "training.demo",
    ),
    libraries=("numpy", "PIL", "safetensors", "torch"),
    lazy_libraries=(
        "numpy", "onnx", "onnxruntime", "onnxruntime_genai", "tokenizers", "transformers",
    ),
    public=True,
)  # fmt: skip
_BENCHMARKS = {
    "benchmarks": _BENCHMARKED,
    **dict.fromkeys(SHARED_BY_BENCHMARKS, _BENCHMARKED),
    "benchmarks.encoder": _BENCHMARKED,
    "benchmarks.generation": _BENCHMARKED,
    "benchmarks.gpu": _BENCHMARKED,
}

# The longest name that fits a module is its part; a module that no name fits is an error.
PARTS = {
    **_FOUNDATION,
    **_RUNTIME,
    **_SERVE,
    **_RAY,
    **_EVALUATION,
    **_EXPORT,
    **_COMMANDS,
    **_TRAINING,
    **_BENCHMARKS,
}

# Modules that import by names from a table: `_LAZY`, `TARGETS` or `FAMILIES`.
IMPORT_BY_TABLE = {
    "benchmarks.gpu.engines",
    "perception_rt",
    "perception_rt.checkpoint.source",
    "perception_rt.export.build",
    "perception_rt.evaluation",
    "perception_rt.evaluation.conformance.library",
    "perception_rt.evaluation.tasks",
    "perception_rt.families",
    "perception_rt.package.names",
    "perception_rt.runtime.load",
    "perception_rt.runtime.session",
}
