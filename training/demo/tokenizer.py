"""Trains the PLM demo's SentencePiece model: `python training/demo/tokenizer.py FILE`.

The corpus is the demo's own questions and answers, drawn from a fixed seed, so the result is
reproducible. Every digit is a piece of its own, and byte pieces cover all other text.
"""

import sys
import tempfile
from pathlib import Path

from perception_rt.processing.llm_vocabulary import CONTROLS
from perception_rt.processing.prompt import SYSTEM
from training.demo.questions import LEARNED, record

VOCAB_SIZE = 512
_SAMPLES = 400  # per set
_SETS = (*LEARNED, "describe", "captions", "last")


def corpus() -> list[str]:
    """Returns the texts that stand between control tokens in prompts."""
    texts = [SYSTEM] * 400 + ["system", "user", "assistant"] * 400
    for name in _SETS:
        for number in range(_SAMPLES):
            found = record(name, 0, number)
            turns = found.get("conversations", [{"value": found.get("text")}])
            texts += [turn["value"] for turn in turns]
    return texts


def train(file: Path) -> None:
    """Trains the model and writes it to a file."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokenizer"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_prefix=str(prefix),
            vocab_size=VOCAB_SIZE,
            model_type="bpe",
            control_symbols=list(CONTROLS),
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            unk_id=0,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            num_threads=1,
            minloglevel=2,
        )
        model = prefix.with_suffix(".model").read_bytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
