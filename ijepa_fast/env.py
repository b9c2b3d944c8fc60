"""`ijepa env`: what is installed and what of it is usable on this machine, to be pasted into a bug report."""
import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from ijepa_fast import arguments
from ijepa_fast.cli import command
from ijepa_fast.threads import usable_cores
from ijepa_fast.version import __version__

PACKAGES = ("torch", "triton", "numpy", "pydantic", "pillow", "safetensors", "rich", "matplotlib", "tensorboard")
EXTRAS = {  # module: the distributions that bring it
    "nvidia.dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "flash_attn_interface": ("flash-attn-3", "flash_attn_3"),
    "flash_attn": ("flash-attn", "flash-attn-4"),
    "xformers": ("xformers",),
    "transformers": ("transformers",),
    "submitit": ("submitit",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "IJEPA_KERNELS", "IJEPA_KERNELS_CHECK", "TRITON_INTERPRET")


@command
def main(argv: list[str] | None = None) -> None:
    arguments.env(argv)
    print("\n".join(lines()))


def lines() -> list[str]:
    """One fact a line, the name first."""
    import torch
    from ijepa_kernels import explain_backends

    facts = {
        "ijepa_fast": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
        **{name: _version(name) for name in PACKAGES},
        "devices": _devices(torch),
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none set",
        **{module: _usable(module, names) for module, names in EXTRAS.items()},
    }
    attention = explain_backends(head_dim=64).splitlines()
    return [f"{name:<22}{fact}" for name, fact in facts.items()] + ["", "attention", *attention]


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _usable(module: str, distributions: tuple[str, ...]) -> str:
    """Its version where it can be imported, else why not."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return "not installed"
        return f"{_version(*distributions)}, not usable: {error}"
    except Exception as error:  # a library that does not find its device or its C library raises what it likes
        return f"{_version(*distributions)}, not usable: {type(error).__name__}: {' '.join(str(error).split())}"
    return f"{_version(*distributions)}, usable"


def _devices(torch) -> str:
    if not torch.cuda.is_available():
        return f"cpu alone (torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'no GPU'})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}" + ("" if len(set(names)) == 1 else f", {names}")


if __name__ == "__main__":
    sys.exit(main())
