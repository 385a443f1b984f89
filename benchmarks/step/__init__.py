"""Parts of the benchmark of a training step."""
