"""The machine a measurement ran on, and how fast it copies and multiplies: the ceilings of every row."""
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness.timing import build_sampler, interleave, l2_bytes
from ijepa_fast import onednn

ROOT = Path(__file__).resolve().parents[2]
COPY_BYTES = 1 << 30  # read and written, for the machine's own figure: more than any cache keeps
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"


def device_name(device: torch.device) -> str:
    """As the driver, or the operating system, calls it; a CPU with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {cores()} core{'s' * (cores() != 1)}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def folder_name(device: str) -> str:
    """`Intel(R) Xeon(R) Processor, 2 cores` -> `intel-xeon-processor-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", device.lower())).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """For every record: device, clocks, driver, versions, commit, date, and how busy the machine was."""
    about = {
        "device": device_name(device),
        "type": device.type,
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": np.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        about |= {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(device))}
        about |= {"clocks": gpu_clocks(), "l2_bytes": l2_bytes(device)}
    else:
        about |= {"simd": torch.backends.cpu.get_cpu_capability(), "mhz": _cpu_mhz()}
    return about


def commit() -> str:
    """The short hash, with `+` if the measured code has uncommitted changes; `unknown` outside a repository."""
    try:
        head = _run("git", "rev-parse", "--short=10", "HEAD")
        changed = _run("git", "status", "--porcelain", "--", "ijepa_fast", "kernels", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def gpu_clocks() -> dict[str, str]:
    try:
        values = _run("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader").splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(CLOCKS.split(","), values, strict=True))


def settle(device: torch.device, seconds: float = 2.0) -> None:
    """Keep a GPU busy until its clocks have left idle."""
    if device.type != "cuda":
        return
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    while True:
        for _ in range(50):
            a @ a
        end.record()
        end.synchronize()
        if start.elapsed_time(end) > 1000 * seconds:
            return


class Ceilings:
    """Copy bandwidth and matmul rates of this machine, each measured once a session, on first use."""

    def __init__(self, device: torch.device):
        self.device = device
        self.measured: dict[str, float] = {}  # what was measured, in bytes/s and FLOP/s, for the record

    def copy_bandwidth(self) -> float:
        """Bytes read plus bytes written per second by `copy_`, between buffers too large for any cache."""
        return self._once("copy", COPY_BYTES, lambda: copy_call(COPY_BYTES, self.device))

    def matmul_rate(self, rows: int, dim: int, mlp_dim: int, dtype: torch.dtype) -> float:
        """FLOP/s of the four products of a transformer block at `rows` tokens, in turn: qkv, proj, fc1 and fc2."""
        shapes = [(dim, 3 * dim), (dim, dim), (dim, mlp_dim), (mlp_dim, dim)]
        flops = sum(2 * rows * k * n for k, n in shapes)
        name = f"matmul {str(dtype).removeprefix('torch.')} {rows}x{dim} mlp {mlp_dim}"

        def make():
            products = [_product(rows, k, n, dtype, self.device) for k, n in shapes]
            return lambda: [product() for product in products]

        return self._once(name, flops, make)

    def _once(self, name: str, amount: float, make) -> float:
        if name not in self.measured:
            timing = interleave({name: build_sampler(make, self.device)}, seconds=0.7)[name]
            self.measured[name] = amount / timing.median
        return self.measured[name]


def copy_call(nbytes: int, device: torch.device):
    """A plain copy that reads and writes `nbytes` in all."""
    source = torch.ones(max(nbytes // 8, 1), dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _product(rows: int, k: int, n: int, dtype: torch.dtype, device: torch.device):
    a, b = torch.randn(rows, k, device=device), torch.randn(n, k, device=device) * k**-0.5
    if dtype == torch.float8_e4m3fn:
        a, b, one = a.to(dtype), b.to(dtype), torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    a, b = a.to(dtype), b.to(dtype)
    if onednn.takes(a, b):  # a ceiling is what the machine can do, whoever does it
        return lambda: onednn.linear(a, b)
    return lambda: a @ b.t()


def _run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_mhz() -> list[float]:
    try:
        return [float(x) for x in re.findall(r"^cpu MHz\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)]
    except OSError:
        return []
