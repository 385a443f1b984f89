"""The GPU suite: its steps, its results and its report."""
