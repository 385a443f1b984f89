"""The trainer: the training loop, evaluation, prediction and their output. Needs `pip install 'corrmatch[train]'`."""
