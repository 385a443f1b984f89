"""Measurement and presentation. Nothing in this package depends on an op."""
