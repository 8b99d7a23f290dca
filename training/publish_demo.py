"""`python training/publish_demo.py RUN_DIR`: makes a run's weights the demo model, and measures it.

Rounds the weights to float16, writes them into `perception_rt/demo`, reads them back, and prints
what CARD.md reports. The only place, besides tests, where the held-out digits are looked at.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from perception_rt.demo import weights_path
from perception_rt.errors import PerceptionError
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.processing.clip_bpe import ClipTokenizer
from training.digits import held_out, held_out_digits
from training.evaluation import classify, confusion, evaluate
from training.scenes import digit_prompts
from training.state import WEIGHTS_FILE, export_weights, load_weights


def report(model: PerceptionEncoder) -> dict[str, Any]:
    """Size, zero-shot accuracies on the held-out digits, and the mistakes on the plain images."""
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


def main(arguments: list[str]) -> int:
    """Publishes one run; returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes a run's weights the demo model.")
    parser.add_argument("run_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        trained = load_weights(options.run_dir / WEIGHTS_FILE)
        export_weights(trained, weights_path(), dtype=torch.float16)
        found = report(load_weights(weights_path()))
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found["file_bytes"] = weights_path().stat().st_size
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
