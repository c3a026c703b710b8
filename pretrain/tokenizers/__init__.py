"""Text to token ids: sentencepiece, `tokenizer.json`, and conversations."""
