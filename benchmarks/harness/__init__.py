"""How things are measured and shown. Nothing here knows an op."""
