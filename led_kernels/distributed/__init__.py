"""This package runs models on several devices at once, in processes that torch.distributed connects."""

from led_kernels.distributed.tensor_parallel import clip_grad_norm_, full_state_dict, parallelize

__all__ = ["clip_grad_norm_", "full_state_dict", "parallelize"]
