"""The config that is meant by a YAML file, or by a run folder, which holds its own."""

from __future__ import annotations

from pathlib import Path

from pretrain.doctor.findings import Request
from pretrain.options.config import Config
from pretrain.options.settings import load_config


def config_of(request: Request) -> Config:
    """Read the config of a request.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    path = Path(request.config)
    return load_config(path / "config.yaml" if path.is_dir() else path, request.overrides)
