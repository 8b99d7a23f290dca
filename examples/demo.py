"""Demonstrates perception_rt: exports models, classifies, draws dense features, streams answers.

`make demo` runs it and puts the results in out/demo. Each export is a command that a user would
type, so this process only runs engines and never loads torch. The exit status is 1 if an engine is
less accurate than expected.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

import perception_rt
from perception_rt.processing.pca import side_by_side
from perception_rt.progress import Progress
from training.data.records import Pixels
from training.demo.digits import Labels, held_out_digits
from training.demo.questions import LEARNED, Record, held_out_record, is_right
from training.demo.scenes import WORDS

OUT = Path("out/demo")
PRECISIONS = ("fp32", "fp16", "int8")
TEMPLATES = ("a photo of the handwritten digit {}", "a handwritten {}")
LEAST_ACCURACY = 0.95
PHOTO = "china.jpg"
PHOTO_SIZE = "320x480"
QUESTIONS = 30
LEAST_RIGHT = 0.8


def main() -> int:
    """Runs all steps; returns the exit status."""
    start = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    print("PE-Demo: a small Perception Encoder, trained on handwritten digits and captions")

    print("\nExport from torch to engines for ONNX Runtime on this CPU")
    for precision in PRECISIONS:
        export("--model", "PE-Demo", "--precision", precision, "--out", str(OUT / precision))

    images, labels = held_out_digits(image_size(OUT / PRECISIONS[0]))
    print(f"\nZero-shot: {len(labels)} digits by writers it has never seen, 10 labels as text")
    accuracies = [classify(OUT / precision, images, labels) for precision in PRECISIONS]

    print(f"\nA photograph (scikit-learn's {PHOTO}): embedding and dense features")
    export("--model", "PE-Demo", "--image-size", PHOTO_SIZE, "--out", str(OUT / "photo"))
    draw_features(OUT / "photo", OUT / "features.png")

    print("\nPLM-Demo: a small Perception Language Model, trained on rows of handwritten digits")
    export("--model", "PLM-Demo", "--precision", "int4", "--out", str(OUT / "plm"))
    right = ask(OUT / "plm")

    assert "torch" not in sys.modules
    print(f"\nThe results are in {OUT}/. The demo took {time.perf_counter() - start:.0f} s.")
    if min(accuracies) < LEAST_ACCURACY:
        print(f"FAILED: expected at least {LEAST_ACCURACY:.0%} of the digits to be right")
        return 1
    if right < LEAST_RIGHT:
        print(f"FAILED: expected at least {LEAST_RIGHT:.0%} of the answers to be right")
        return 1
    return 0


def export(*options: str) -> None:
    """Runs `perception-export`, which prints its own errors; exits if it fails."""
    arguments = [*options, "--force"]
    print("  $ perception-export", *arguments, flush=True)
    command = Path(sys.executable).with_name("perception-export")
    start = time.perf_counter()
    result = subprocess.run([command, *arguments], stdout=subprocess.DEVNULL, check=False)  # noqa: S603
    if result.returncode:
        sys.exit(result.returncode)
    with perception_rt.load(Path(options[-1])) as engine:
        content, record = engine.manifest.content, engine.manifest.record
    size = sum(entry.size_bytes for entry in content.files.values()) / 1e6
    cosine = min(result["cosine"] for result in record["fidelity"].values())
    print(
        f"    {time.perf_counter() - start:.1f} s, {size:.1f} MB, lowest cosine of any output "
        f"against torch {cosine:.5f}"
    )


def image_size(package: Path) -> int:
    """Side in pixels of the images that a package takes."""
    with perception_rt.Embedder.load(package) as engine:
        return engine.image_spec.height


def classify(package: Path, images: Pixels, labels: Labels) -> float:
    """Prints accuracy and throughput; returns the accuracy, 0 to 1."""
    with Progress() as progress, perception_rt.Embedder.load(package) as engine:
        classes = engine.embed_labels(WORDS, TEMPLATES)
        engine.embed_images([images[0]])  # opens the engine outside the timed part
        start = time.perf_counter()
        embeddings = engine.embed_images(list(images), on_progress=progress.counter("images"))
        seconds = time.perf_counter() - start
        batch = engine.batch_size
    right = int(((embeddings @ classes.T).argmax(axis=1) == labels).sum())
    accuracy = right / len(labels)
    print(
        f"  {package.name}: accuracy {accuracy:.1%} ({right} of {len(labels)}), "
        f"{len(labels) / seconds:,.0f} images/s at batch size {batch}"
    )
    return accuracy


def draw_features(package: Path, picture: Path) -> None:
    """Writes a picture of the photograph beside its last block's features (PCA as colours)."""
    photo = np.asarray(load_sample_image(PHOTO))
    start = time.perf_counter()
    with perception_rt.Embedder.load(package) as engine:
        (dense,) = engine.features([photo])
        (embedding,) = engine.embed_images([photo])
    side_by_side(Image.fromarray(photo), dense).save(picture)
    height, width, channels = dense.shape
    print(
        f"  {picture}: {height}x{width} patches of {channels} channels, "
        f"and an embedding of {embedding.size} numbers, in {time.perf_counter() - start:.1f} s"
    )


def ask(package: Path) -> float:
    """Streams an answer to one question of each kind, then answers many in batches.

    Saves the scenes of the streamed answers beside the package.

    Returns:
        The share of right answers, 0 to 1.
    """
    with perception_rt.Generator.load(package) as plm:
        for number, name in enumerate(LEARNED):
            found = held_out_record(name, number)
            pictures = images_of(found)
            file = package.with_name(f"scene_{name}.png")
            Image.fromarray(np.concatenate(pictures, axis=1)).resize(
                (256 * len(pictures), 256), Image.Resampling.NEAREST
            ).save(file)
            question, expected = (turn["value"] for turn in found["conversations"])
            print(f"  {file}: {question} ", end="", flush=True)
            answer = ""
            for piece in plm.stream(question, images=pictures, max_new_tokens=32):
                print(piece, end="", flush=True)
                answer += piece
            print("" if is_right(name, answer, found) else f"   (it is {expected})")
        asked = [(name, held_out_record(name, n)) for n in range(QUESTIONS) for name in LEARNED]
        requests = [
            perception_rt.Request(
                found["conversations"][0]["value"], images=images_of(found), max_new_tokens=32
            )
            for _, found in asked
        ]
        start = time.perf_counter()
        results = plm.generate_batch(requests)
        seconds = time.perf_counter() - start
    answers = zip(asked, results, strict=True)
    right = sum(is_right(name, result.text, found) for (name, found), result in answers)
    share = right / len(requests)
    print(
        f"  {len(requests)} questions about digits by unseen writers: {share:.1%} right, "
        f"{len(requests) / seconds:.0f} answers/s"
    )
    return share


def images_of(found: Record) -> list[Pixels]:
    """Images of a record."""
    image = found["image"]
    return image if isinstance(image, list) else [image]


if __name__ == "__main__":
    sys.exit(main())
