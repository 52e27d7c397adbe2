"""Measures the stock and the patched SDK side by side."""
