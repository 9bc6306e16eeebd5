"""What a training step costs: FLOPs, bytes and memory as expressions in its sizes, from the graphs themselves."""
