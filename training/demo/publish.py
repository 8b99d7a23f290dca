"""Publishes a run as a demo model: `python training/demo/publish.py RUN_DIR`.

Rounds the weights to float16 and writes them into `perception_rt/demo`. An encoder is read back and
evaluated on the held-out digits, for CARD.md. A language model is evaluated by
`benchmarks/demo_accuracy.py` with its engines.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from perception_rt.checkpoint.locate import CONFIG_NAME, TOKENIZER_NAME, find_config
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.demo import language_model_path, weights_path
from perception_rt.errors import PerceptionError
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.clip_bpe import ClipTokenizer
from training.demo.digits import held_out, held_out_digits
from training.demo.scenes import digit_prompts
from training.demo.zero_shot import classify, confusion, evaluate
from training.model.export import WEIGHTS_FILE, export_encoder, load_weights


def report(model: PerceptionEncoder) -> dict[str, Any]:
    """Returns size, zero-shot accuracies on the held-out digits, and mistakes on plain images."""
    assert model.config.text is not None
    tokenizer = ClipTokenizer(context_length=model.config.text.context_length)
    images, labels = held_out_digits(model.config.vision.image_size)
    counts = confusion(classify(model, images, digit_prompts(), tokenizer), labels, 10)
    mistakes = {
        f"{truth} as {answer}": int(counts[truth, answer])
        for truth in range(10)
        for answer in range(10)
        if truth != answer and counts[truth, answer]
    }
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": evaluate(model, held_out()),
        "mistakes_plain": mistakes,
    }


def publish_language_model(run_dir: Path, folder: Path) -> None:
    """Copies an exported folder, with its weights in float16."""
    config = find_config(run_dir)
    assert isinstance(config, PlmConfig)
    source = open_checkpoint(run_dir, config)
    weights = {name: source.load(name).to(torch.float16) for name in expected_tensors(config)}
    folder.mkdir(exist_ok=True)
    save_checkpoint(weights, folder / WEIGHTS_FILE, layout="original")
    for name in (CONFIG_NAME, TOKENIZER_NAME):
        shutil.copyfile(run_dir / name, folder / name)


def main(arguments: list[str]) -> int:
    """Publishes one run and returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Publishes the weights of a run as the demo model, rounded to float16."
    )
    parser.add_argument("run_dir", type=Path, help="run.out_dir of a finished run")
    options = parser.parse_args(arguments)
    try:
        if (options.run_dir / CONFIG_NAME).is_file():
            publish_language_model(options.run_dir, language_model_path())
            return 0
        trained = load_weights(options.run_dir / WEIGHTS_FILE)
        path = weights_path()
        export_encoder(
            trained.state_dict(), trained.config, path.parent, name=path.name, dtype=torch.float16
        )
        found = report(load_weights(weights_path()))
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found["file_bytes"] = weights_path().stat().st_size
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
