import pytest
import torch


@pytest.fixture(autouse=True)
def _triton_runs_here() -> None:
    from led_kernels.dispatch import BackendUnavailable, can_run

    try:
        can_run("triton", torch.device("cuda"), raise_error=True)
    except BackendUnavailable as refusal:
        pytest.skip(str(refusal))
