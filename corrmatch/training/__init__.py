"""The trainer: losses, methods, the loop, evaluation and prediction. Needs `pip install 'corrmatch[train]'`."""
