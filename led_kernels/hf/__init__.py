"""This package makes LED and Longformer models of Hugging Face transformers run on the fused kernels.

    from led_kernels.hf import apply_led_kernels
    apply_led_kernels(model)

It serves transformers 4.53 and later; ``led_kernels.hf.compat.TESTED`` lists the tested releases. The encoder is
replaced, and LED's decoder too, unless a release generates the right tokens with every cache by itself.
"""

from led_kernels.extras import install_extra

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(f"led_kernels.hf needs transformers; {install_extra('hf')}.") from error

# Before 4.53 the encoders, which are replaced here, did the gradient checkpointing of their layers.
if tuple(map(int, _transformers.__version__.split(".")[:2])) < (4, 53):
    raise ImportError(
        f"led_kernels.hf needs transformers 4.53 or later and found {_transformers.__version__}; upgrade it."
    )

from led_kernels.hf.patching import apply_led_kernels, decoder_report, is_applied, revert_led_kernels
from led_kernels.hf.positions import resize_position_embeddings

__all__ = [
    "apply_led_kernels",
    "decoder_report",
    "is_applied",
    "resize_position_embeddings",
    "revert_led_kernels",
]
