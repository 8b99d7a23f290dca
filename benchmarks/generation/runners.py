"""Ways to run a decoder of one shape, one per row of the table.

Each feeds a prompt of token ids, then decodes greedily at batch 1. Peers get random weights of the
same shape, drawn on the fly, since no kernel depends on their values. A missing library is an
ImportError. Only a library's own row imports it, so memory figures are that row's alone.

Legend: T tokens of a prompt.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from benchmarks.flops import decoder_bytes
from perception_rt.errors import BackendError
from perception_rt.package.contract import CHUNK_TOKENS
from perception_rt.package.reader import open_package
from perception_rt.plm_config import DecoderConfig
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.generation.plm_engine import PlmEngine

Array = np.ndarray[Any, Any]
Kind = Literal["engine", "eager", "genai"]

GENAI_DIRECTORY = "genai"
TOKENIZER_FILE = "tokenizer.json"

# The options documented for a CPU, and a head that computes only the last token's logits, as the
# other rows do.
_GENAI_OPTIONS = ("accuracy_level=4", "block_size=32", "prune_lm_head=true", "hf_token=false")
_GENAI_WEIGHTS = "model.onnx.data"
# Engines with integer weights compute in int8; on a CPU, fp16 engines compute in fp32.
_ENGINE_LIMIT = {"fp32": "fp32", "fp16": "fp32", "int8": "int8", "int4": "int8"}


class Runner(Protocol):
    """An open decoder.

    Attributes:
        read_bytes: bytes of weights that one token reads.
    """

    read_bytes: int

    def prefill(self, ids: Array, steps: int) -> None:
        """Decodes a prompt, int64 (T,), and chooses the first token; at most `steps` follow."""

    def step(self) -> None:
        """Decodes the last chosen token and chooses the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run the decoder.

    Attributes:
        name: name in the table.
        kind: selects how the row is opened.
        limit: name of the measured peak that its prefill is compared with.
        dtype: dtype of torch weights; empty for a row without torch.
    """

    name: str
    kind: Kind
    limit: str
    dtype: str = ""


BASELINE = Row(name="transformers bf16", kind="eager", limit="bf16", dtype="bfloat16")
PEERS = (
    BASELINE,
    Row(name="transformers fp32", kind="eager", limit="fp32", dtype="float32"),
    Row(name="onnxruntime-genai int4", kind="genai", limit="int8"),
)


def engine_row(precision: str) -> Row:
    """The row of a package."""
    return Row(name="engine", kind="engine", limit=_ENGINE_LIMIT[precision])


def open_runner(
    row: Row, config: DecoderConfig, *, package: Path, work: Path, threads: int
) -> Runner:
    """Opens a row.

    Args:
        row: the row to run.
        config: the decoder's shape.
        package: package of the engine row.
        work: directory that `build_genai` wrote to.
        threads: threads of each library.
    """
    match row.kind:
        case "engine":
            return _Engine(package, threads)
        case "eager":
            return _Eager(config, row.dtype, threads)
        case "genai":
            return _Genai(work / GENAI_DIRECTORY, config, threads)


class _Engine:
    """Calls a package's decoder with the prompt in chunks, as the scheduler does."""

    def __init__(self, path: Path, threads: int) -> None:
        package = open_package(path)
        package.verify()
        content = package.manifest.content
        self.read_bytes = decoder_bytes(content)
        self._decoder = PlmEngine(
            package, backend=content.target.backend, device="cpu", threads=threads
        )

    def prefill(self, ids: Array, steps: int) -> None:
        self._cache = CacheBlock(self._decoder.cache_shape, 1, len(ids) + steps)
        self._length = 0
        for start in range(0, len(ids), CHUNK_TOKENS):
            self._append(ids[start : start + CHUNK_TOKENS])

    def step(self) -> None:
        self._append(self._next)

    def _append(self, ids: Array) -> None:
        logits = self._decoder.forward(
            self._decoder.embed(ids)[None],
            np.array([self._length], np.int32),
            self._cache,
            slice(0, 1),
            np.array([[len(ids) - 1]]),
        )
        self._next = logits[0].argmax(axis=-1)
        self._length += len(ids)


class _Eager:
    """transformers' Llama in eager mode, with torch's fused attention and a dynamic cache."""

    def __init__(self, config: DecoderConfig, dtype: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = _llama(config, getattr(torch, dtype))
        self.read_bytes = sum(p.nbytes for p in self._model.parameters())
        if not config.weight_tying:
            self.read_bytes -= self._model.model.embed_tokens.weight.nbytes

    def prefill(self, ids: Array, steps: int) -> None:
        self._past: Any = None
        self._append(self._torch.from_numpy(ids)[None])

    def step(self) -> None:
        self._append(self._next)

    def _append(self, ids: Any) -> None:
        with self._torch.inference_mode():
            output = self._model(
                input_ids=ids, past_key_values=self._past, use_cache=True, logits_to_keep=1
            )
            self._past, self._next = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)


class _Genai:
    """onnxruntime-genai with its own loop."""

    def __init__(self, folder: Path, config: DecoderConfig, threads: int) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime_genai as genai  # type: ignore[import-not-found]

        settings = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai = genai
        self._model = genai.Model(settings)
        self.read_bytes = (folder / _GENAI_WEIGHTS).stat().st_size
        if not config.weight_tying:  # a token reads one row of the float32 embedding
            self.read_bytes -= 4 * config.dim * config.vocab_size

    def prefill(self, ids: Array, steps: int) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        length = len(ids) + steps + 1
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(ids.astype(np.int32))
        self._generator.generate_next_token()  # from logits that the prompt computed

    def step(self) -> None:
        self._generator.generate_next_token()


def build_genai(config: DecoderConfig, tokenizer: bytes, out: Path) -> None:
    """Builds onnxruntime-genai's int4 model of a random decoder, with its own builder.

    Args:
        config: the decoder's shape.
        tokenizer: any `tokenizer.json`, which the builder copies.
        out: folder to create.

    Raises:
        ImportError: a library is missing.
        BackendError: the builder failed.
    """
    import onnxruntime_genai  # noqa: F401
    import torch

    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        source = Path(directory)
        _llama(config, torch.bfloat16).save_pretrained(source)
        (source / TOKENIZER_FILE).write_bytes(tokenizer)
        named = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (source / "tokenizer_config.json").write_text(json.dumps(named))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(source), "-o", str(out), "-c", str(source / "cache")]
        command += ["-p", "int4", "-e", "cpu", "--extra_options", *_GENAI_OPTIONS]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1].partition(" (")[0]
        raise BackendError(f"onnxruntime-genai's builder failed: {last}")


def _llama(config: DecoderConfig, dtype: Any) -> Any:
    """transformers' model with random weights; its own initialization would take minutes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seqlen,
        tie_word_embeddings=config.weight_tying,
    )
    shape.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    model.set_attn_implementation("sdpa")  # an error if it cannot be had
    weights = {}
    for name, parameter in model.named_parameters():
        bound = (3 / parameter.shape[-1]) ** 0.5
        drawn = torch.empty(parameter.shape, dtype=dtype)
        weights[name] = drawn.uniform_(-bound, bound) if drawn.ndim > 1 else drawn.fill_(1)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(shape)  # the table is not a parameter
    return model.eval()
