"""Which tensors an optimizer keeps for a weight, and which weights are Muon's. Without torch: a planner asks it too."""

from __future__ import annotations

from pretrain.options.config import OptimSection

# Two-dimensional, but lookups or classifiers rather than maps between hidden states: Muon leaves them to AdamW.
_NO_HIDDEN_MATRIX = ("embedding.", "position_embedding.", "output.")


def is_hidden_matrix(name: str, num_dimensions: int) -> bool:
    """Tell whether a parameter maps hidden states to hidden states, and so is updated by Muon where that is chosen."""
    return num_dimensions == 2 and not name.startswith(_NO_HIDDEN_MATRIX)


def moment_names(section: OptimSection, by_muon: bool) -> tuple[str, ...]:
    """Names of the state tensors kept for each weight, each of the weight's shape, fp32.

    Args:
        section: the config's `optim`.
        by_muon: whether it is one of those that Muon updates itself.
    """
    momentum = ("momentum_buffer",) if section.momentum > 0 else ()
    match section.name:
        case "muon" if by_muon:
            return ("momentum_buffer",)
        case "adamw" | "adam" | "muon":
            return ("exp_avg", "exp_avg_sq")
        case "lion":
            return ("exp_avg",)
        case "sgd":
            return momentum
        case "rmsprop":
            return ("square_avg", *momentum)
