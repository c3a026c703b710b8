"""Attention over what each query sees: causal or full, packed documents, sliding window, grouped queries.

Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023, "GQA"; sliding window: Beltagy et al. 2020,
"Longformer"; soft-cap: Gemma Team 2024, "Gemma 2".
"""

from __future__ import annotations

from torch import Tensor

from kernels.attention_torch import attention_sdpa, attention_truth
from kernels.dropout import DropoutKey
from kernels.visibility import Visibility


def attention(
    q_BTHC: Tensor,
    k_BSKC: Tensor,
    v_BSKC: Tensor,
    visible: Visibility,
    dropout_p: float = 0.0,
    dropout_key: DropoutKey | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let each query average the values of the keys that it sees.

    Args:
        q_BTHC: queries; H is a multiple of K, and query head h uses key head h // (H / K).
        k_BSKC: keys of the S slots, of which the queries are the last T.
        v_BSKC: values.
        visible: which keys each query sees; one that sees none gets zeros.
        dropout_p: probability that a probability is dropped.
        dropout_key: seed, step, rows and place of the dropout; None for no dropout.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay as they are.
        scale: what scores are multiplied by, above 0; None: 1 / sqrt(C).

    Returns:
        `[B, T, H, C]`.
    """
    if softcap is not None or (dropout_p > 0.0 and dropout_key is not None):
        return attention_truth(q_BTHC, k_BSKC, v_BSKC, visible, dropout_p, dropout_key, softcap, scale)
    return attention_sdpa(q_BTHC, k_BSKC, v_BSKC, visible, scale)
