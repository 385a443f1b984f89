"""Data sets, views and the generated sample. Needs `pip install 'corrmatch[train]'`."""
