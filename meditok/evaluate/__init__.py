"""How good a tokenizer is, by a protocol that its results state in full: `meditok evaluate`."""
