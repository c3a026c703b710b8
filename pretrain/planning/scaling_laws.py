"""How many tokens a model of some size is worth, and what size a budget of computing is worth.

Three rules for the lowest loss of a budget of computing, C = 6 N D for N parameters and D tokens:

- `fit`: loss = E + A / N^alpha + B / D^beta with the corrected constants; the optimum is
  N = G (C / 6)^(beta / (alpha + beta)), D = C / (6 N), G = (alpha A / (beta B))^(1 / (alpha + beta)).
- `published`: the same with the constants that were published first, whose rounding and early stopping were shown to
  be why it asks for so many more tokens at large sizes.
- `ratio`: D = 20 N.

A model that will be used much is trained on far more tokens than this, as it is then cheaper to run (Llama 3 8B: 1,900
a parameter).

Source: Hoffmann et al. 2022 (arXiv:2203.15556), approach 3 and table A3; Besiroglu et al. 2024 (arXiv:2404.10102).
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_PER_PARAMETER = 20.0
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class LossFit:
    """Constants of loss = E + A / N^alpha + B / D^beta, nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, num_parameters: float, num_tokens: float) -> float:
        """Loss of a model of this size after this many tokens, of the texts and tokenizer of the fit."""
        return self.E + self.A / num_parameters**self.alpha + self.B / num_tokens**self.beta

    def tokens_for(self, num_parameters: float) -> float:
        """Tokens for which this size is the best use of the computing."""
        # alpha A N^-alpha = beta B D^-beta, where the loss can be lowered by neither at the other's cost
        return float((self.beta * self.B / (self.alpha * self.A) * num_parameters**self.alpha) ** (1.0 / self.beta))

    def parameters_for(self, num_tokens: float) -> float:
        """The size for which this many tokens are the best use of the computing."""
        return float((self.alpha * self.A / (self.beta * self.B) * num_tokens**self.beta) ** (1.0 / self.alpha))

    def parameters_for_flops(self, flops: float) -> float:
        """The size that makes the most of this much computing, with C / (6 N) tokens."""
        factor = (self.alpha * self.A / (self.beta * self.B)) ** (1.0 / (self.alpha + self.beta))
        return float(factor * (flops / 6.0) ** (self.beta / (self.alpha + self.beta)))


CORRECTED = LossFit(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
PUBLISHED = LossFit(1.69, 406.4, 410.7, 0.34, 0.28)


def flops_of(gpu_days: float, peak_flops: float, utilisation: float) -> float:
    """Computing that so many days on one GPU give, at this model FLOPs utilisation (0 to 1)."""
    return gpu_days * SECONDS_PER_DAY * peak_flops * utilisation


def recommend(
    *, num_parameters: float | None = None, num_tokens: float | None = None, flops: float | None = None
) -> dict[str, dict[str, float]]:
    """Return what each rule makes of one given quantity.

    Args:
        num_parameters: of the model, or
        num_tokens: that there are, or
        flops: of computing, 6 per parameter and token.

    Returns:
        For `fit`, `published` and `ratio`: `parameters`, `tokens`, `flops`, and the `loss` of the corrected fit.
    """
    found = {}
    for name, fit in (("fit", CORRECTED), ("published", PUBLISHED), ("ratio", None)):
        if num_parameters is not None:
            size = num_parameters
            tokens = fit.tokens_for(size) if fit else TOKENS_PER_PARAMETER * size
        elif num_tokens is not None:
            tokens = num_tokens
            size = fit.parameters_for(tokens) if fit else tokens / TOKENS_PER_PARAMETER
        else:
            assert flops is not None, "one of the three must be given"
            size = fit.parameters_for_flops(flops) if fit else (flops / (6.0 * TOKENS_PER_PARAMETER)) ** 0.5
            tokens = flops / (6.0 * size)
        found[name] = {
            "parameters": size, "tokens": tokens, "flops": 6.0 * size * tokens, "loss": CORRECTED.loss(size, tokens)
        }  # fmt: skip
    return found
