from pathlib import Path

import pytest

# These are raised by lines of led_kernels, or by how the classes that it replaces are called.
DEPRECATIONS_OF_OURS = (
    "error::FutureWarning:led_kernels",
    "error::DeprecationWarning:led_kernels",
    r"error:.*`(LED(En|De)coder|Longformer(Encoder|SelfAttention))\w*\.forward`:FutureWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for line in DEPRECATIONS_OF_OURS:
                item.add_marker(pytest.mark.filterwarnings(line))


@pytest.fixture(autouse=True)
def _stock_classes_afterwards():
    yield
    from led_kernels.hf import revert_led_kernels

    revert_led_kernels()
