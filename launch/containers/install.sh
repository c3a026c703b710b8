#!/bin/sh
# What both recipes do inside of the image, as root, in the folder of the repository: `make setup`, with the image's torch.
set -eu
python3 -c 'import torch' || { echo "install.sh: the base image has no torch; expected one with torch and CUDA." >&2; exit 1; }
where() { "$1" -c 'import torch; print(torch.__version__, torch.__file__)'; }
before=$(where python3)

missing=
command -v make >/dev/null || missing="$missing make"
command -v cc >/dev/null || missing="$missing gcc libc6-dev" # Triton compiles with it
python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
if [ -n "$missing" ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # shellcheck disable=SC2086
  apt-get install -y -qq --no-install-recommends $missing
  rm -rf /var/lib/apt/lists/*
fi

# NVIDIA's images hold pip to the versions that they came with, which need not be those of setup.py.
export PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1
SYSTEM_TORCH=1 make setup
after=$(where .venv/bin/python)
[ "$before" = "$after" ] || { echo "install.sh: torch was $before and is $after; expected the image's." >&2; exit 1; }

# Training needs no rights. Apptainer brings its own user, and has none of this name.
id longhaul >/dev/null 2>&1 || useradd --create-home --uid 10001 longhaul
chown longhaul . # so that data/ and runs/ can be made here
