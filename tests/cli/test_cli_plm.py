"""Commands on packages of language models: export, inspect, doctor, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from one_line import fails
from repack import repack
from safetensors.torch import load_file, save_file

import perception_rt as prt
from perception_rt.cli import export_main, main, report
from perception_rt.package import contract
from perception_rt.package.manifest import Manifest, Target
from perception_rt.package.reader import read_manifest


def test_what_the_export_made(plm_package: Path, capsys) -> None:
    assert main(["inspect", str(plm_package), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["content"]
    assert (content["name"], content["family"]) == ("tiny", "plm")
    assert content["weights"]["layout"] == "original"
    assert content["processing"]["text"]["kind"] == "hf"
    assert content["files"]["tokenizer.json"]["bytes"] > 0
    assert main(["verify", str(plm_package)]) == 0


def test_inspect_says_what_a_language_model_costs(plm_package: Path, capsys) -> None:
    assert main(["inspect", str(plm_package)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "target      onnxruntime, fp32",
        "decoder     layers 3, dim 128, parts 1, vocab_size 320, max_seqlen 8192",
        "formats     float32 throughout",
        "tiles       4 tokens each",
        # 3 layers x keys and values x 2 heads x 32 channels x 4 bytes
        "cache       1,536 bytes per token, 12,582,912 for max_seqlen",
    ):
        assert line in lines
    shown = "\n".join(lines)
    assert "tokenizer   file tokenizer.json" in shown and "kind hf" in shown
    assert "fidelity    decoder_0.logits: cosine" in shown
    (graph,) = (line for line in lines if line.startswith("graph       decoder_0"))
    assert "6 caches -> logits" in graph and len(graph) < 240


def test_formats_are_named_by_precision(plm_package: Path, tmp_path: Path) -> None:
    def formats(precision: str, **options: Any) -> str:
        target = Target(backend="onnxruntime", precision=precision, options=options)
        out = repack(plm_package, tmp_path / f"{precision}{len(options)}", target=target)
        (line,) = (x for x in report.describe(read_manifest(out)) if x.startswith("formats"))
        return line.removeprefix("formats").strip()

    assert formats("int4", blocks="int8") == (
        "int8 in tower, int8 in decoder blocks, int4 in embedding and head"
    )
    assert formats("int8") == "int8 in tower, decoder blocks, embedding and head"
    assert formats("{other}") == "{other}"


def test_half_precision_caches_take_half(plm_package: Path) -> None:
    manifest = read_manifest(plm_package)
    content, name = manifest.content, contract.decoder_part(0)
    graph = content.graphs[name].to_dict()
    for tensor in graph["inputs"] + graph["outputs"]:
        if "cache" in tensor["name"]:
            tensor["dtype"] = "float16"
    graphs = {**content.graphs, name: contract.GraphSpec.from_dict(graph)}
    half = Manifest.create(replace(content, graphs=graphs), record=manifest.record)
    lines = report.describe(half)
    assert "cache       768 bytes per token, 6,291,456 for max_seqlen" in lines


def test_a_good_package_has_no_notes(plm_package: Path) -> None:
    assert report.lint(plm_package) == ["intact: all files match the manifest"]


def test_lint_without_a_tokenizer(plm_package: Path, tmp_path: Path) -> None:
    out = repack(plm_package, tmp_path / "p", text=None, leave_out="tokenizer.json")
    assert [note for note in report.lint(out) if "no tokenizer" in note]
    assert "tokenizer   none: token ids only" in report.describe(read_manifest(out))


def test_lint_names_a_library_that_a_tokenizer_needs(plm_package: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "tokenizers" else name)
    (note,) = report.lint(plm_package)[1:]
    assert note == 'tokenizers is not installed: pip install "perception_rt[plm]"'


def test_lint_finds_what_is_not_quantized(plm_package: Path, tmp_path: Path) -> None:
    target = Target(
        backend="onnxruntime",
        precision="int4",
        options={"blocks": "int8", "float_layers": [], "block_layers": ["a", "b"]},
    )
    notes = report.lint(repack(plm_package, tmp_path / "p", target=target))
    assert "decoder_0: the head is not quantised, and each token reads all of it" in notes
    assert "2 linear layers are int8 by blocks: by rows would lose accuracy" in notes


def changed_model(package: Path, change: Any) -> bytes:
    model = onnx.load(package / "decoder_0.onnx", load_external_data=False)
    change(model.graph)
    return model.SerializeToString()


def product(**attributes: int) -> onnx.NodeProto:
    inputs = ["hidden", "packed", "scale"]
    return onnx.helper.make_node(
        "MatMulNBits", inputs, ["unused"], domain="com.microsoft", bits=4, **attributes
    )


@pytest.mark.parametrize(
    ("levels", "inside", "noted"),
    [([4], [], 0), ([4, 1], [], 1), ([None, None, 4], [], 2), ([4, 4], [None], 1), ([4], [4], 0)],
)
def test_lint_finds_products_in_float(
    plm_package: Path,
    tmp_path: Path,
    levels: list[int | None],
    inside: list[int | None],
    noted: int,
) -> None:
    """Also in a subgraph, which comes first here."""

    def products(levels: list[int | None]) -> list[onnx.NodeProto]:
        return [product() if v is None else product(accuracy_level=v) for v in levels]

    def change(graph: onnx.GraphProto) -> None:
        if inside:
            branch = onnx.helper.make_graph(products(inside), "branch", [], [])
            node = onnx.helper.make_node("Loop", [], ["y"], bits=3, body=branch, accuracy_level=0)
            graph.node.append(node)
        graph.node.extend(products(levels))

    files = {"decoder_0.onnx": changed_model(plm_package, change)}
    notes = report.lint(repack(plm_package, tmp_path / "p", files=files))
    found = [f"decoder_0: {noted} MatMulNBits compute in float: accuracy_level is not 4"]
    assert notes[1:] == (found if noted else [])


def test_lint_finds_caches_that_are_never_updated(plm_package: Path, tmp_path: Path) -> None:
    lost = contract.updated(contract.value_cache(1))
    graphs = dict(read_manifest(plm_package).content.graphs)
    spec = graphs["decoder_0"].to_dict()
    spec["outputs"] = [tensor for tensor in spec["outputs"] if tensor["name"] != lost]
    graphs["decoder_0"] = contract.GraphSpec.from_dict(spec)

    def change(graph: onnx.GraphProto) -> None:
        graph.output.remove(next(value for value in graph.output if value.name == lost))

    files = {"decoder_0.onnx": changed_model(plm_package, change)}
    notes = report.lint(repack(plm_package, tmp_path / "p", files=files, graphs=graphs))
    assert "decoder_0: 1 caches are read but never updated: value_cache_1" in notes


def test_a_package_without_an_architecture_is_damaged(
    plm_package: Path, tmp_path: Path, capsys
) -> None:
    out = repack(plm_package, tmp_path / "p", architecture={})
    (note,) = report.lint(out)
    assert note.startswith(report.DAMAGED) and "vision_model" in note
    assert main(["doctor", out]) == 2
    capsys.readouterr()
    fails(capsys, ["inspect", out], "vision_model", run=main)


def test_each_family_has_its_commands(
    plm_package: Path, tiny_package: Path, picture: str, tmp_path: Path, capsys
) -> None:
    plm, pe = str(plm_package), str(tiny_package)
    for arguments, message in (
        (["embed", plm, "--text", "a"], "is a language model: it is for generate and chat"),
        (["classify", plm, "--image", picture, "--label", "a"], "it is for generate and chat"),
        (
            ["features", plm, "--image", picture, "--out", str(tmp_path / "x.png")],
            "it is for generate and chat",
        ),
        (["generate", pe, "--prompt", "a"], "is an encoder: it is for embed, classify and feat"),
        (["chat", pe], "it is for embed, classify and features"),
    ):
        fails(capsys, arguments, message, run=main)
    assert list(tmp_path.iterdir()) == []


def test_bad_questions_are_one_line(
    plm_package: Path, picture: str, clip: str, tmp_path: Path, capsys
) -> None:
    plm = str(plm_package)
    bare = repack(plm_package, tmp_path / "bare", text=None, leave_out="tokenizer.json")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(clip).read_bytes()[:-300])
    fake = tmp_path / "fake.mp4"
    fake.write_text("no video")
    ask, image = ["generate", plm, "--prompt", "What?"], ["--image", picture]
    for arguments, message in (
        (["generate", plm, "--prompt", "a" * 9000], "; the context has 8192"),
        (["generate", plm, "--prompt", "a" * 70_000], "the limit is 65536"),
        (["generate", plm, "--prompt", "<image> or <image>?", *image], "2 <image> or <video> mark"),
        ([*ask, "--image", "absent.jpg"], "image 0: image 'absent.jpg' cannot be read"),
        ([*ask, "--video", "absent.mp4"], "'absent.mp4' cannot be read"),
        ([*ask, "--video", str(broken)], "is damaged or is not a video"),
        ([*ask, "--video", str(fake)], "is damaged or is not a video"),
        ([*ask, *image, "--max-tiles", "1000000"], "max_tiles must be an integer from 0 to 36"),
        ([*ask, "--num-frames", "1000000"], "num_frames must be an integer from 1 to 32"),
        ([*ask, *image, *["--image", picture] * 60], "Lower max_tiles or num_frames"),
        ([*ask, "--temperature", "-0.5"], "temperature must be a finite number of at least 0"),
        ([*ask, "--temperature", "nan"], "temperature must be a finite number"),
        ([*ask, "--top-p", "1.5"], "top_p must be a finite number from 0 to 1"),
        ([*ask, "--top-k", "0"], "top_k must be an integer from 1 to 320"),
        (
            [*ask, "--repetition-penalty", "0"],
            "repetition_penalty must be a finite number from",
        ),
        ([*ask, "--seed", "-1"], "seed must be an integer of at least 0"),
        ([*ask, "--max-new-tokens", "0"], "max_new_tokens must be an integer of at least 1"),
        ([*ask, "--stop", ""], "stop must hold strings of 1 to 256 characters"),
        ([*ask, "--lookup", "--temperature", "1"], "lookup is for temperature 0 only"),
        ([*ask, "--stream", "--json"], "--stream and --json exclude each other"),
        ([*ask, "--cache-dir", str(fake)], "the cache directory cannot be made"),
        (["generate", bare, "--prompt", "a"], "tiny has no tokenizer and takes token ids only"),
        (["chat", bare], "tiny has no tokenizer and takes token ids only"),
    ):
        fails(capsys, arguments, message, run=main)


def test_sequences_can_be_shorter_than_the_model_s(
    plm_package: Path, plm_files, tmp_path: Path
) -> None:
    out = tmp_path / "short"
    command = [*plm_files.arguments, "--tokenizer", str(plm_files.tokenizer), "--out", str(out)]
    assert export_main([*command, "--max-length", "300"]) == 0
    with prt.load(out) as short, prt.load(plm_package) as long:
        wanted = long.generate("What is this?", max_new_tokens=8)
        assert short.generate("What is this?", max_new_tokens=8).tokens == wanted.tokens
        with pytest.raises(prt.PerceptionError, match="300"):
            short.generate("What? " * 60, max_new_tokens=8)


def test_bad_exports_are_one_line(plm_files, tmp_path: Path, capsys) -> None:
    folder, here = tmp_path / "shards", tmp_path / "out"
    folder.mkdir()
    here.mkdir()
    tensors = load_file(plm_files.weights)
    save_file({key: tensors.pop(key) for key in sorted(tensors)[:5]}, folder / "1.safetensors")
    table = dict.fromkeys(tensors, "2.safetensors") | {"norm.weight": "1.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    shutil.copy(plm_files.config, folder / "params.json")
    poem = tmp_path / "poem.txt"
    poem.write_text("roses are red")
    other = tmp_path / "tokenizer.json"
    other.write_text(plm_files.tokenizer.read_text().replace("<|image|>", "<|picture|>"))
    good, out = [*plm_files.arguments, "--out", str(here / "p")], ["--out", str(here / "p")]
    for arguments, message in (
        ([*good, "--tokenizer", str(poem)], "poem.txt' is an unknown tokenizer"),
        ([*good, "--tokenizer", "absent.model"], "'absent.model' cannot be read"),
        ([*good, "--tokenizer", str(other)], "does not have <|image|>"),
        (["--checkpoint", str(folder), *out], "cannot read 2.safetensors: it is missing"),
        (["--checkpoint", str(plm_files.weights), *out], "--checkpoint needs --config"),
        ([*good, "--blocks", "int4"], "blocks can be int4 in precision int4 only"),
        ([*good, "--blocks", "int3", "--precision", "int4"], "blocks must be int8 or int4"),
        ([*good, "--taps", "none"], "--taps is for an encoder"),
        ([*good, "--image-size", "56"], "--image-size is for an encoder"),
        ([*good, "--center-crop"], "--center-crop is for an encoder"),
        ([*good, "--max-length", "8193"], "--max-length 8193 is not in 1 to the model's 8192"),
        ([*good, "--max-length", "0"], "--max-length 0 is not in 1 to"),
    ):
        fails(capsys, arguments, message)
        assert list(here.iterdir()) == []
