"""Launches are captured as a GPU would get them, compiled for the target, and leave nothing behind."""

import pytest
import torch
import triton
from aot_toys import add_one_kernel
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from benchmarks.static import gpus
from benchmarks.static.fake_driver import captured_launches, compilation_keys, gpu_target


@pytest.mark.parametrize(("arch", "binary"), [("sm_80", "cubin"), ("sm_90", "cubin"), ("gfx942", "hsaco")])
def test_compiles_for_the_target(arch, binary):
    x, out = torch.zeros(1000), torch.zeros(1000)
    with captured_launches(arch) as launches:
        add_one_kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](
            x, out, 1000, 1, BLOCK=256, num_warps=2
        )
    (launch,) = launches
    assert launch.name == "add_one_kernel"
    assert launch.target == arch
    assert launch.grid == (4, 1, 1)
    assert launch.kernel.metadata.target == gpu_target(arch)
    assert launch.kernel.metadata.num_warps == 2
    assert launch.kernel.asm[binary]


def test_arguments_are_those_of_the_launcher():
    x, out = torch.zeros(1000), torch.zeros(1000)
    with captured_launches("sm_80") as launches:
        add_one_kernel[(4,)](x, out, size=1000, scale=1, BLOCK=256)
    (launch,) = launches
    assert list(launch.arguments) == ["x_ptr", "out_ptr", "size", "scale", "BLOCK", "WITH_SCALE"]
    assert launch.arguments["x_ptr"] is x
    assert launch.constexprs == {
        "scale": 1,
        "BLOCK": 256,
        "WITH_SCALE": False,
    }  # an int that is 1 is compiled in
    assert {name: kind for name, (kind, _) in launch.parameters.items()} == {
        "x_ptr": "*fp32",
        "out_ptr": "*fp32",
        "size": "i32",
    }


def test_callback_may_execute_the_launch():
    x, out = torch.zeros(1000), torch.zeros(1000)

    def execute(launch):
        torch.add(launch.arguments["x_ptr"], 1, out=launch.arguments["out_ptr"])

    with captured_launches("sm_80", on_launch=execute):
        add_one_kernel[(4,)](x, out, 1000, 2, BLOCK=256)
    assert out.eq(1).all()


def test_everything_is_restored_also_after_an_error():
    before = driver._active, JITFunction.run
    with captured_launches("sm_90"):
        assert driver.active.get_current_target() == gpu_target("sm_90")
    with pytest.raises(ZeroDivisionError), captured_launches("sm_90"):
        raise ZeroDivisionError
    assert (driver._active, JITFunction.run) == before


def test_too_much_shared_memory_is_an_error_as_on_the_gpu(monkeypatch):
    x, out = torch.zeros(1000), torch.zeros(1000)
    small = gpus.Gpu("small", 1, -1, 0, 64, 32)
    monkeypatch.setitem(gpus.GPUS, "sm_80", small)
    with pytest.raises(OutOfResources, match="shared memory"), captured_launches("sm_80"):
        add_one_kernel[(4,)](x, out, 1000, 2, BLOCK=512)


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="sm_75"), captured_launches("sm_75"):
        pass


def test_compilation_keys_tell_specialisations_apart_and_compile_nothing():
    x, out = torch.zeros(1000), torch.zeros(1000)
    with captured_launches("sm_80"):
        add_one_kernel[(4,)](x, out, 1000, 2, BLOCK=256)  # what is compiled already counts as well
    with compilation_keys("sm_80") as keys:
        for size in (1000, 999, 998, 992):  # 16 divides only the last
            assert add_one_kernel[(4,)](x, out, size, 2, BLOCK=256) is None
    assert {name: len(found) for name, found in keys.items()} == {"aot_toys.add_one_kernel": 2}
