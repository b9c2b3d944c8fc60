"""Two packages in one distribution: the driver `ijepa_fast` and the op library `ijepa_kernels`.

The ops alone: `pip install ./kernels`, which has a setup of its own.
"""
import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search('"(.+)"', Path(__file__).with_name("ijepa_fast").joinpath("version.py").read_text().splitlines()[1])

setup(
    name="ijepa_fast",
    version=VERSION[1],
    description="Fast I-JEPA pretraining: fused Triton ops and a thin training driver",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ijepa_fast", "ijepa_fast.*"]), "ijepa_fast.configs", "ijepa_kernels"],
    # kernels/ is a source root, not a package: an __init__.py there would shadow Hugging Face's `kernels`.
    package_dir={"ijepa_kernels": "kernels/ijepa_kernels", "ijepa_fast.configs": "configs"},
    package_data={"ijepa_fast": ["py.typed"], "ijepa_fast.configs": ["*.yaml"], "ijepa_kernels": ["py.typed"]},
    entry_points={"console_scripts": ["ijepa = ijepa_fast.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "pydantic>=2.12",
        "pyyaml",
        "pillow",
        "simplejpeg",  # decodes at 1.5 times the speed of Pillow, and strictly
        "rich",
        "matplotlib",
        "tensorboard",
        "safetensors",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130>=2.4"],  # the plain `nvidia-dali` on PyPI is an empty stand-in
        "flash": ["flash-attn", "ninja"],  # builds from source: needs CUDA_HOME
        "xformers": ["xformers>=0.0.35"],
        "hf": ["transformers>=5.17"],
        "timm": ["timm>=1.0.31"],  # brings torchvision, which the tests do without: see the Makefile
        "slurm": ["submitit"],
        "parquet": ["pyarrow"],
        "remote": ["fsspec", "s3fs", "gcsfs", "huggingface_hub"],  # data.root=s3://, gs://, hf://, ...
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "demo": ["scikit-image", "scikit-learn"],  # for the photographs they ship
        "dev": [
            "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "submitit",
            "transformers>=5.17", "pyarrow",
        ],
    },
)
