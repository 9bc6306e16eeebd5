"""Per-token quantities computed from logits: which calls work position by position, and where the vocabulary ends."""
