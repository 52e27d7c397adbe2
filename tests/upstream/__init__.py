"""Upstream's own test suites, unmodified, against the stock wheel and the patched one."""
