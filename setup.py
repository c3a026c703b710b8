"""Package of Longhaul: three folders of modules and one console command."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# `SYSTEM_TORCH=1 make setup` keeps the torch of a container image, whatever its version is called
TORCH = [] if os.environ.get("SYSTEM_TORCH") else ["torch>=2.11,<2.14", 'triton>=3.6,<3.8; platform_system == "Linux"']

# `make docs`, and the tests of the pages
DOCS = ["furo>=2025.7", "myst-parser>=5,<6", "sphinx>=9,<10"]

setup(
    name="longhaul",
    version=re.search(r'__version__ = "(.+)"', (HERE / "pretrain/__init__.py").read_text(encoding="utf-8")).group(1),
    description="Pretraining of decoder-only Transformers, from raw text to a verified export",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    package_data={"kernels": ["tiles/*.json"], "launch": ["slurm/*.sbatch"], "pretrain.reporting": ["pages/*"]},
    python_requires=">=3.11",
    packages=find_packages(include=["pretrain", "pretrain.*", "kernels", "kernels.*", "launch", "launch.*"]),
    install_requires=[
        *TORCH,
        "deepspeed==0.19.8",  # options vanish between its patch releases
        "fsspec[http]>=2024.6",  # http is aiohttp; no upper bound: s3fs and gcsfs want the version of their own date
        "jinja2>=3.1,<4",  # torch asks for it too
        "numpy>=1.26,<3",
        "packaging>=24",  # versions by the calendar; DeepSpeed and transformers ask for it too
        "psutil>=5.9,<8",  # DeepSpeed asks for it too
        "pyarrow>=18,<30",
        "pydantic>=2.11,<3",
        "rich>=14,<16",
        "ruamel.yaml>=0.18,<0.20",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboard>=2.19,<3",
        "tokenizers>=0.22,<1",
        "transformers>=5,<6",
        "webdataset>=1.0.2,<2",
        "zstandard>=0.23,<1",
    ],
    extras_require={
        # what `benchmarks/` compares with, beside transformers; Liger is for GPUs
        "bench": ["accelerate>=1.1,<2", 'liger-kernel>=0.8.5,<0.9; platform_system == "Linux"'],
        # near-duplicates, Wikipedia's markup, languages: what `prepare` does by choice
        "data": ["datasketch>=2,<3", "mwparserfromhell>=0.6.6,<0.8", "py3langid>=0.3,<0.5"],
        # `make docs`
        "docs": DOCS,
        # tasks of launch/evaluate.py and eval.tasks
        "evals": ["lm-eval>=0.4.13,<0.5"],
        "gguf": ["gguf>=0.17,<1"],  # `convert --to gguf`; llama-cpp-python beside it runs what was written
        "gs": ["gcsfs>=2024.6"],
        "report": ["matplotlib>=3.9,<4", "plotly>=6,<8"],  # pages and pictures of `launch/report.py`
        "s3": ["s3fs>=2024.6"],
        # what answers of tuned models are scored by
        "tasks": ["rouge-score>=0.1.2,<0.2", "sacrebleu>=2.5,<3"],
        "wandb": ["wandb>=0.31,<1"],
        "test": [
            *DOCS,
            "accelerate>=1.1,<2",
            "datasets>=4,<6",
            "datasketch>=2,<3",
            "flask>=3,<4",  # with flask-cors, what moto's server needs; its own extra brings 40 packages more
            "flask-cors>=5,<7",
            "gguf>=0.17,<1",
            "hypothesis>=6.100,<7",
            "lm-eval>=0.4.13,<0.5",
            "matplotlib>=3.9,<4",
            "moto[s3]>=5,<6",
            "mwparserfromhell>=0.6.6,<0.8",
            "mypy>=1.15,<3",
            "peft>=0.17,<1",
            "plotly>=6,<8",
            "py3langid>=0.3,<0.5",
            "pytest>=8.3,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "rouge-score>=0.1.2,<0.2",
            "ruff>=0.15,<1",
            "s3fs>=2024.6",
            "sacrebleu>=2.5,<3",
            "wandb>=0.31,<1",
        ],
    },
    entry_points={"console_scripts": ["longhaul = launch.cli:main"]},
)
