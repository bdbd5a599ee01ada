"""Drop-in for LED and Longformer models of Hugging Face transformers.

    from led_kernels.hf import apply_led_kernels
    apply_led_kernels(model)

Tested with transformers 4.53, 4.57, 5.0 and 5.23. The encoder is replaced, and from 4.56 LED's decoder too, unless a
release decodes right with a static cache by itself.
"""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError("led_kernels.hf needs transformers; pip install 'led-kernels[hf]'.") from error

# before 4.53 the encoders, which are replaced here, did the gradient checkpointing of their layers
if tuple(map(int, _transformers.__version__.split(".")[:2])) < (4, 53):
    raise ImportError(
        f"led_kernels.hf needs transformers 4.53 or later and found {_transformers.__version__}; upgrade it."
    )

from led_kernels.hf.patching import apply_led_kernels, revert_led_kernels

__all__ = ["apply_led_kernels", "revert_led_kernels"]
