"""Times our models in PyTorch on a GPU, eager and compiled, for comparison with engines."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.flops import decoder_weights, vision_flops
from benchmarks.gpu.timing import Bench, Row
from perception_rt.config import VisionConfig
from perception_rt.models.decoder import Decoder, rope_1d
from perception_rt.models.layers import Rope, merge_heads, rotated_heads
from perception_rt.models.vision import VisionTower
from perception_rt.plm_config import DecoderConfig

PROMPT, STEPS, SLOTS = 512, 64, 2048


def tower_rows(bench: Bench, name: str, config: VisionConfig, peak: Row) -> Iterator[Row]:
    """Yields rows of a tower in eager and compiled float16, compared with eager float32."""
    torch.manual_seed(0)
    tower = VisionTower(config).to(bench.device).eval()
    initialize(tower)
    size, batch = config.image_size, 2 if bench.quick else 64
    pixels = torch.randn(batch, 3, size, size, device=bench.device)
    exact = tower(pixels[:1])
    tower = tower.to(bench.dtype)
    bench.forget_memory()
    pixels = pixels.to(bench.dtype)
    for how in ("eager", "torch.compile"):
        # dynamic=False: a second batch size would otherwise compile for any size.
        run = tower if how == "eager" else torch.compile(tower, dynamic=False)
        cosine = F.cosine_similarity(run(pixels[:1]).float(), exact, dim=-1).min()
        many = bench.seconds(partial(run, pixels))
        one = bench.seconds(partial(run, pixels[:1]))
        yield {
            "model": name,
            "how": how,
            "images_per_s": batch / many,
            "batch_1_ms": one * 1e3,
            "cosine": float(cosine),
            "share_of_peak": batch * vision_flops(config) / many / peak["flops"],
            "memory_gib": bench.memory_gib(),
        }


def initialize(module: nn.Module) -> None:
    """Sets random matrices, gains of one and zero biases."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))


class StaticCache:
    """An `Attention` kernel that updates one sequence's keys and values in place.

    The first pass is a prompt, later passes have one token. Each is written for a fast PyTorch
    kernel; the one for masks takes no grouped heads.
    """

    def __init__(self, config: DecoderConfig, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (1, config.kv_heads, slots, config.head_dim)
        # One tensor per layer: compiled code would copy a shared one in every layer.
        self.caches = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            for _ in range(config.n_layers)
        ]
        from torch._dynamo import mark_static_address

        for cache in (each for pair in self.caches for each in pair):
            # Without a static address, CUDA graphs would be skipped for a mutated input.
            mark_static_address(cache)
        self.slots = torch.arange(slots, device=device)
        self.positions = self.slots[:1]
        self.layers = iter(self.caches)

    def start(self, positions: Tensor) -> None:
        """Begins a pass over tokens at `positions` (T,)."""
        self.positions, self.layers = positions, iter(self.caches)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        kv_heads: int | None = None,
        rope: Rope | None = None,
        causal: bool = False,
        mask: Any = None,
    ) -> Tensor:
        """Attention of (1, T, C) over the cache up to each token's position."""
        q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=kv_heads, rope=rope)
        keys, values = next(self.layers)
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        if q.shape[2] > 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return merge_heads(y)
        seen = self.slots <= self.positions[:, None]
        grouped = q.reshape(1, keys.shape[1], -1, q.shape[3])  # (1, K, H / K, E)
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen)
        return merge_heads(y.reshape(q.shape))


def decoder_rows(bench: Bench, name: str, config: DecoderConfig, peak: Row) -> Iterator[Row]:
    """Yields rows of a decoder in eager and compiled float16 (CUDA graphs)."""
    slots, prompt, steps = (64, 16, 4) if bench.quick else (SLOTS, PROMPT, STEPS)
    cache = StaticCache(config, slots, bench.device, bench.dtype)
    with torch.device("meta"):
        decoder = Decoder(config, attention=cache)
    decoder = decoder.to(bench.dtype).to_empty(device=bench.device).eval()
    initialize(decoder)
    bench.forget_memory()
    rope = rope_1d(config, slots, bench.device)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        cache.start(positions)
        hidden = decoder.tok_embeddings(ids)
        for layer in decoder.layers:
            hidden = layer(hidden, Rope(rope.cos[positions], rope.sin[positions]))
        return decoder.head(decoder.norm(hidden[:, -1:])).argmax(-1)

    ids = torch.randint(0, config.vocab_size, (1, prompt), device=bench.device)

    def answer(step: Callable[..., Tensor]) -> tuple[Tensor, float]:
        """Token ids of the steps after the prompt, and their seconds."""
        token, found = forward(ids, cache.slots[:prompt]), []
        bench.wait()
        started = time.perf_counter()
        for index in range(steps):
            token = step(token, cache.slots[prompt + index : prompt + index + 1]).clone()
            found.append(token)
        bench.wait()
        return torch.cat(found, dim=1), time.perf_counter() - started

    weights = decoder_weights(config) * (2 if bench.dtype == torch.float16 else 4)
    answers = []
    for how in ("eager", "torch.compile"):
        compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
        step = forward if how == "eager" else compiled
        first = bench.seconds(lambda: forward(ids, cache.slots[:prompt]), 3)
        runs = [answer(step) for _ in range(5)]  # the first two compile
        answers.append(runs[-1][0])
        seconds = median(seconds for _, seconds in runs[2:]) / steps
        yield {
            "model": name,
            "how": how,
            "first_token_ms": first * 1e3,
            "tokens_per_s": 1 / seconds,
            "share_of_bandwidth": weights / seconds / peak["bytes_per_s"],
            "same_tokens": bool((answers[-1] == answers[0]).all()),
            "memory_gib": bench.memory_gib(),
        }
