"""``led info``: what is installed, and which kernels can run here or why not."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import led_kernels
from led_kernels.dispatch import BACKENDS, BackendUnavailable, can_run, choose_backend
from led_model.terminal import table


def run_info() -> None:
    """Prints versions, the processor's instruction set, threads, devices, and one line per backend."""
    print(table([[name, value] for name, value in _facts()]))
    print("\nbackends")
    for name in BACKENDS:
        print(f"  {name:<10} {_usable(name)}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"\nfor float32 tensors on {device}: {choose_backend(torch.device(device), torch.float32)}")


def _facts() -> list[tuple[str, str]]:
    packages = ("torch", "triton", "transformers", "tokenizers", "huggingface_hub")
    return [
        ("led-kernels", led_kernels.__version__),
        ("python", platform.python_version()),
        *((name, _version(name)) for name in packages),
        ("processor", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", str(torch.get_num_threads())),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _usable(backend: str) -> str:
    try:
        can_run(backend, raise_error=True)
    except BackendUnavailable as refusal:
        return f"no: {str(refusal).split(': ', 1)[1]}"
    return "usable" if backend != "reference" else "usable (the tests' oracle; never chosen by itself)"
