"""A demonstration: the same tasks under the stock SDK and under the patched one."""
