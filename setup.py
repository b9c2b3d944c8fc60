"""Two packages in one distribution: the driver `ijepa_fast` and the op library `ijepa_kernels`."""
from setuptools import setup

setup(
    name="ijepa_fast",
    version="0.1.0",
    description="Fast I-JEPA pretraining: fused Triton ops and a thin training driver",
    python_requires=">=3.11",
    packages=[
        "ijepa_fast",
        "ijepa_fast.data",
        "ijepa_fast.decode",
        "ijepa_fast.evaluation",
        "ijepa_fast.view",
        "ijepa_fast.weights",
        "ijepa_kernels",
    ],
    # kernels/ is a source root, not a package: an __init__.py there would shadow Hugging Face's `kernels`.
    package_dir={"ijepa_kernels": "kernels/ijepa_kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "pydantic>=2.12",
        "pyyaml",
        "pillow",
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
        "jpeg": ["simplejpeg"],  # strict decoding, for `python -m ijepa_fast.data.index --verify`
        "slurm": ["submitit"],
        "parquet": ["pyarrow"],
        "demo": ["scikit-image", "scikit-learn"],  # for the photographs they ship
        "dev": [
            "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "submitit",
            "transformers>=5.17", "pyarrow",
        ],
    },
)
