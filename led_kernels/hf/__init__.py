"""Drop-in for LED and Longformer models of Hugging Face transformers.

    from led_kernels.hf import apply_led_kernels
    apply_led_kernels(model)

Tested with transformers 5.23 and 4.57. The encoder is replaced; LED's decoder stays transformers'.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("led_kernels.hf needs transformers; pip install 'led-kernels[hf]'.") from error

from led_kernels.hf.patching import apply_led_kernels, revert_led_kernels

__all__ = ["apply_led_kernels", "revert_led_kernels"]
