"""Exact savings: the same loss and gradients, to round-off, in less activation memory."""
