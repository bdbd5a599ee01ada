"""Runs ``led info``, which says what is installed, and which kernels can run here or why not."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

import led_kernels
from led_kernels.dispatch import BACKENDS, BackendUnavailable, backend_module, can_run, choose_backend

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "huggingface_hub")


def run_info() -> None:
    """Prints versions, processor, threads, devices, and one line for the drop-in, per backend and per device."""
    facts = {
        "led-kernels": led_kernels.__version__,
        "python": platform.python_version(),
        "imported from": str(Path(led_kernels.__file__).parent),
        **{package: _version(package) for package in _PACKAGES},
        "drop-in": _drop_in(),
        "processor": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "cuda kernels": _cuda_build(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for title, rows in (
        ("installed", facts),
        ("backends", {backend: _usable(backend) for backend in BACKENDS}),
        ("chosen for float32 tensors on", {device: _chosen(device) for device in devices}),
    ):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<16} {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _drop_in() -> str:
    """Returns whether transformers' release was tested, and whose LED decoder is right in it."""
    try:
        from led_kernels.hf import decoder_report
        from led_kernels.hf.compat import tested_note
    except ImportError as reason:
        return f"no: {reason}"
    return f"this transformers is {tested_note()}; {decoder_report()}"


def _cuda_build() -> str:
    try:
        return f"built for {backend_module('cuda').describe_build()}"
    except ImportError as reason:
        return f"none: {reason}"


def _usable(backend: str) -> str:
    try:
        can_run(backend, raise_error=True)
        if backend == "cpu":
            return f"usable, instruction set {backend_module('cpu').instruction_set()}"
    except BackendUnavailable as refusal:
        return "no: " + str(refusal).removeprefix(f"backend {backend!r} cannot run: ")
    except ValueError as refusal:  # LED_KERNELS_CPU_ISA names an instruction set that is not there
        return f"no: {refusal}"
    return "usable, for tests; never chosen by itself" if backend == "reference" else "usable"


def _chosen(device: str) -> str:
    try:
        return choose_backend(torch.device(device), torch.float32)
    except (BackendUnavailable, ValueError) as refusal:  # LED_KERNELS_BACKEND names a backend that cannot run
        return str(refusal)
