"""``backend``: each test that takes it runs for every backend that was made for this GPU."""

import pytest

from tests.backends import reason_against


@pytest.hookimpl(trylast=True)  # backends vary fastest, so that they share the truth
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names_its_own = any(mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not names_its_own:
        metafunc.parametrize("backend", ["triton", "cuda"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Names a backend that was made for this GPU, and for the test's ``dtype`` if it has one."""
    dtype = request.node.callspec.params.get("dtype")
    if reason := reason_against(request.param, "cuda", dtype):
        pytest.skip(reason)
    return request.param
