"""Every op test runs three times: the PyTorch form, the Triton kernel in its interpreter, the compiled kernel on a GPU.

`pytest -m gpu` runs the last one alone, un-interpreted: Triton decides at import whether a kernel is interpreted, so
the two cannot share a process.
"""
import os
import sys

import pytest
import torch

MODE_OF_PATH = {"torch": "torch", "interpret": "interpret", "cuda": "triton", "cuda-torch": "torch"}


def wants_gpu(config) -> bool:
    words = config.option.markexpr.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and before != "not" for before, word in zip(["", *words], words, strict=False))


def pytest_configure(config):
    if not wants_gpu(config):
        if not {"triton", "ijepa_kernels"}.isdisjoint(sys.modules):
            raise pytest.UsageError("run tests/kernels first or alone: the ops were imported without the interpreter")
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available() or not wants_gpu(config):
        why = "needs a CUDA device" if not torch.cuda.is_available() else "run with `pytest -m gpu`"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=why))


GPU_PATHS = [pytest.param(path, marks=pytest.mark.gpu) for path in ("cuda", "cuda-torch")]


@pytest.fixture(params=["torch", "interpret", *GPU_PATHS])
def device(request, monkeypatch) -> str:
    """The device to make tensors on; sets IJEPA_KERNELS so that the op under test takes this path."""
    monkeypatch.setenv("IJEPA_KERNELS", MODE_OF_PATH[request.param])
    return "cuda" if request.param.startswith("cuda") else "cpu"


@pytest.fixture(params=["torch", "interpret", GPU_PATHS[0]])
def reproducible_device(request, monkeypatch) -> str:
    """As `device`, without PyTorch's forms on a GPU: `index_add_` is made of float atomics there."""
    monkeypatch.setenv("IJEPA_KERNELS", MODE_OF_PATH[request.param])
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(params=["interpret", GPU_PATHS[0]])
def kernel_device(request, monkeypatch) -> str:
    """As `device`, for tests that concern the Triton kernels alone."""
    monkeypatch.setenv("IJEPA_KERNELS", MODE_OF_PATH[request.param])
    return "cuda" if request.param == "cuda" else "cpu"
