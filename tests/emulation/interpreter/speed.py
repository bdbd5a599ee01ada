"""Leaves out what Triton's interpreter repeats in each call of a jit function: over half of its time on small tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Within the context ``triton.language`` is the interpreter's, instead of from the start of each call on.

    The 64-bit arithmetic beside each 32-bit one is left out as well: Triton looks at it in its debug mode only.
    ``numerics`` looks for overflow by itself.
    """
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    user_of_both_modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patched = interpreter._patch_lang(user_of_both_modules)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.interpreter_builder, "options", options)
            patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
            # with numpy 2.4 that of Triton 3.6 raises
            patch.setattr(tl.tensor, "__index__", lambda self: self.handle.data.item())
            yield
    finally:
        patched.restore()
