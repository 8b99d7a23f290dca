"""The demo models: their data, tokenizer, evaluation and publishing."""
