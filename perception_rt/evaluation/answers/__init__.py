"""Tasks of language models: questions about images and videos, asked and scored."""
