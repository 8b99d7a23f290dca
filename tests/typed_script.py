"""A user's script, checked by mypy in `test_typed_api.py`; it is never run."""

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import perception_rt as prt
from perception_rt.export import ExportOptions, export
from perception_rt.package.manifest import Manifest

Rows = NDArray[np.float32]


def report(index: int, error: prt.InputError) -> None:
    print(index, error)


pe = prt.Embedder.load("pe-demo", threads=2)
assert_type(pe, prt.Embedder)
assert_type(pe.embed_images(["cat.jpg"], workers=2), Rows)
assert_type(pe.embed_images([b"bytes", np.zeros((8, 8, 3), np.uint8)]), Rows)
assert_type(pe.embed_images(name for name in ("a.jpg", "b.jpg")), Rows)
assert_type(pe.embed_texts(["a cat"], on_error=report), Rows)
assert_type(pe.embed_videos(["clip.mp4"]), Rows)
assert_type(pe.classify(["cat.jpg"], ["cat", "dog"]), Rows)
assert_type(pe.embed_labels(["cat"]), Rows)
assert_type(pe.features(["cat.jpg"]), Rows)
assert_type(pe.encode_pixels(np.zeros((1, 3, 8, 8), np.float32)), Rows)
assert_type(pe.encode_tokens(np.zeros((1, 8), np.int64)), Rows)
assert_type(pe.dim, int)
assert_type(pe.logit_scale, float)
with prt.Embedder.load("pe-demo") as opened:
    assert_type(opened, prt.Embedder)

with prt.Generator.load("plm-demo", kv_bytes=2**30) as plm:
    assert_type(plm, prt.Generator)
    answer = plm.generate("Where is the 5?", images=["digits.png"])
    assert_type(answer, prt.Result)
    assert_type(answer.text, str)
    assert_type(answer.tokens, tuple[int, ...])
    assert_type(answer.timings.ttft_s, float | None)
    assert_type(plm.generate_batch([prt.Request("Read the digits.")]), list[prt.Result])
    some = plm.generate_batch([prt.Request("Read.")], on_error=report)
    assert_type(some, list[prt.Result | None])
    for piece in plm.stream("Hello"):
        assert_type(piece, str)
    assert_type(plm.submit(prt.Request("Hello")), prt.Handle)
    assert_type(plm.generate_tokens([1, 2], max_new_tokens=3), list[int])
    assert_type(plm.prefill_logits([1, 2]), Rows)
    assert_type(plm.score("Where is the 5?", "Left.").logprobs, NDArray[np.float64])
    assert_type(plm.stats, prt.GeneratorStats)
    assert_type(plm.stats.kv_bytes, int)

model = prt.load("either")
assert_type(model, prt.Embedder | prt.Generator)
if isinstance(model, prt.Generator):
    assert_type(model.generate("Hello"), prt.Result)
else:
    assert_type(model.embed_texts(["Hello"]), Rows)

options = ExportOptions(model="PE-Demo", precision="int8", out="pe-demo", image_size=(64, 96))
assert_type(options.seed, int)
manifest = export(options)
assert_type(manifest, Manifest)
assert_type(manifest.id, str)
assert_type(manifest.content.target.precision, str)
assert_type(pe.manifest, Manifest)
