import pytest


@pytest.fixture(autouse=True)
def _stock_classes_afterwards():
    yield
    from led_kernels.hf import revert_led_kernels

    revert_led_kernels()
