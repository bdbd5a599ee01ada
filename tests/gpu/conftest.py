"""``backend``: each test that takes it runs for every backend on the GPU, or is skipped in the words of its refusal."""

import pytest
import torch


@pytest.hookimpl(trylast=True)  # backends vary fastest, so that they share the truth
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names_its_own = any(mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not names_its_own:
        metafunc.parametrize("backend", ["triton", "cuda"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """One that runs here, in the test's ``dtype`` if it has one."""
    from led_kernels.dispatch import BackendUnavailable, can_run

    dtype = request.node.callspec.params.get("dtype")
    try:
        can_run(request.param, torch.device("cuda"), dtype, raise_error=True)
    except BackendUnavailable as refusal:
        pytest.skip(str(refusal))
    return request.param
