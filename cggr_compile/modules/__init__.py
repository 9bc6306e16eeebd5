"""``torch.nn`` modules for training code of one's own; they need no compilation."""
