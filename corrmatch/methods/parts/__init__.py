"""Parts that at least two methods share."""
