"""Shipped configurations: `corrmatch train NAME`."""
