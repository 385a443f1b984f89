"""Segmentation networks with the correlation head. Needs `pip install 'corrmatch[train]'`."""
