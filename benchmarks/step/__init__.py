"""What a training step is measured with."""
