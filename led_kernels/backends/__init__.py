"""Backends; each module holds banded_forward, banded_backward, global_forward, global_backward and imports no other."""
