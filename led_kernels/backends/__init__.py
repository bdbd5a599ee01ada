"""Backends; each module holds banded_forward, banded_backward, global_forward, global_backward and imports no other.

``_extension`` and ``_gpu`` are no backends: they are what two of them share.
"""
