"""Which layers adapters stand beside, and what their parameters are called. Without torch: a planner asks it too."""

from __future__ import annotations

from collections.abc import Iterable

from pretrain.options.config import LoraSection

# The layers of a block that an entry of `train.lora.targets` means; a feed-forward has gate_up or up.
LAYERS = {"qkv": ("attention.qkv",), "attention_output": ("attention.output",),
          "ffn_up": ("ffn.gate_up", "ffn.up"), "ffn_down": ("ffn.down",)}  # fmt: skip
A, B = "lora_a", "lora_b"


def adapted_layers(targets: Iterable[str]) -> set[str]:
    """Names, within a block, of the layers that get adapters."""
    return {layer for target in targets for layer in LAYERS[target]}


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of those that LoRA adds."""
    return name.endswith((f".{A}", f".{B}"))


def scale_of(section: LoraSection) -> float:
    """What an adapter's product is multiplied by."""
    return section.alpha / section.rank
