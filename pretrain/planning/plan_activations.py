"""How much memory a micro-batch's forward and backward pass take beside the states.

B rows of T tokens that n ranks share are N = B T / n tokens of each. What the layers keep is what `layers.py` and
`kernels/` save on a GPU; tests count it on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.loss_chunks import chunk_rows
from pretrain.options.families import ModelShape


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's forward pass.

    Args:
        kept: that the backward pass needs, of all blocks, embedding and final norm, without the loss.
        loss: gradients that the loss computes in the forward pass and keeps.
        loss_peak: what is there beside these while the loss is computed, or its gradients are handed on.
        handed_on: of that, the gradients.
        block_peak: what is there beside `kept` while a block's backward pass runs.
    """

    kept: int
    loss: int
    loss_peak: int
    handed_on: int
    block_peak: int


def activations(
    shape: ModelShape, num_rows: int, seq_len: int, mode: str, size: int, masked: bool, shared_by: int = 1,
    chunk_tokens: int = 0,
) -> Activations:  # fmt: skip
    """Count what the forward pass of a micro-batch keeps, and what comes on top.

    Args:
        shape: the model.
        num_rows: B.
        seq_len: T.
        mode: `train.activation_checkpointing`.
        size: bytes of a weight, which activations have too.
        masked: attention is PyTorch's, which holds a mask: in fp32, and on GPUs before compute capability 8.0.
        shared_by: ranks that share the rows.
        chunk_tokens: `train.ffn_chunk_tokens`.
    """
    N, D, F = num_rows * seq_len // shared_by, shape.dim, shape.ffn_dim
    H, K, C = shape.num_heads, shape.num_kv_heads, shape.head_dim
    norm_bytes = 8 if shape.norm == "layernorm" else 4  # mean and deviation of each token, fp32
    gated = shape.activation == "swiglu"
    up = 2 * F if gated else F
    turned = (H + K) * C if shape.positions == "rope" or shape.qk_norm else 0
    repeated = 2 * H * C if masked and K < H else 0
    in_chunks = 0 < chunk_tokens < N
    qkv = (H + 2 * K) * C
    explicit = masked and (shape.attention_softcap is not None or shape.attention_dropout > 0)
    scores = (4 + size) * H * seq_len if explicit else 0  # bytes a token: probabilities in fp32, and rounded
    small = 2 * norm_bytes + (0 if not shape.qk_norm else 8 if shape.qk_norm == "full" else 4 * (H + K))
    attended = H * C * size + 4 * H + scores  # what attention returns, and the logarithms of its sums
    cheap = (4 * D + turned + repeated) * size + small  # norms, RoPE
    dear = qkv * size + attended  # products and attention
    if shared_by > 1:  # attention keeps what it got from other ranks, and the product after it what came back
        got = ((H + 2 * max(K, shared_by)) * C + H * C) * size
        cheap -= turned * size
        dear += got
    if not in_chunks:
        cheap, dear = cheap + F * size, dear + up * size
    alone = dear - (0 if shape.qk_norm or shared_by == 1 else qkv * size)  # which is no longer needed then
    behind = shape.norm == "reordered_rmsnorm"  # the norm of what `down` returns keeps that, which no other block does
    block = {"none": cheap + alone, "selective": dear + (3 + behind) * D * size, "full": 2 * D * size,
             "offload": 0}[mode]  # fmt: skip
    tables = 4 * shape.rope_dim if shape.positions == "rope" else 0
    # The stream before the last norm; with `full`, in place of the first; with `selective`, of the last block's `down`.
    final = 0 if mode == "full" or (mode == "selective" and behind) else D * size
    mask = num_rows * seq_len**2 * size if masked else 0
    kept = N * (shape.num_layers * block + final + tables + norm_bytes + 12 * shared_by) + mask
    # `selective` frees one of the products that it kept; `offload` has fetched what the block before needs
    again = {"none": 0, "selective": cheap - D * size, "full": cheap + alone,
             "offload": cheap + alone + 2 * D * size}[mode]  # fmt: skip
    most = max(_backward_bytes(shape, N, size, chunk_tokens if in_chunks else 0, shared_by))
    classes = shape.padded_vocab_size
    loss = 4 * (classes + N) * D
    logits = 4 * chunk_rows(N, shape.vocab_size) * shape.vocab_size
    handed_on = size * (classes + N) * D
    return Activations(
        kept=int(kept), loss=loss, loss_peak=max(logits + size * N * D, handed_on), handed_on=handed_on,
        block_peak=int(N * (again - D * size) + most + (size * classes * D if shape.tie_embeddings else 0)),
    )  # fmt: skip


def _backward_bytes(shape: ModelShape, N: int, size: int, chunk_tokens: int, shared_by: int) -> tuple[int, ...]:
    """Bytes at the moments of a block's backward pass, beside what it kept and less what it has freed by then.

    They are gradients of the residual stream and of what is worked on, and the one of a weight that has just been made.
    """
    D, F, H, K, C = shape.dim, shape.ffn_dim, shape.num_heads, shape.num_kv_heads, shape.head_dim
    up = 2 * F if shape.activation == "swiglu" else F
    brought = H * C if shared_by > 1 else 0
    attention = N * ((2 * H + 2 * K) * C - D - brought) * size + N * H * C * 4
    down, up_weight = F * D * size, up * D * size
    if chunk_tokens:  # the weights' gradients of the chunks so far, the next one's, and the sum of both
        chunk, so_far = chunk_tokens * size, down + up_weight
        return (
            2 * N * D * size + so_far + 2 * down + chunk * (F + up),
            2 * N * D * size + so_far + 2 * up_weight + chunk * D,
            4 * N * D * size + so_far,  # the input's gradient, likewise
            attention,
        )
    return (
        N * (D + F) * size + down,
        N * (D + up) * size,  # the activation
        N * (2 * D - F) * size + up_weight,
        attention - N * (up + F) * size,
    )


def offloaded_bytes(shape: ModelShape, num_tokens: int, size: int) -> int:
    """Bytes of the blocks' inputs in the host's memory, with `train.activation_checkpointing: offload`.

    Torch may take up to twice as much: it rounds what is pinned up to a power of two.
    """
    return (2 * shape.num_layers - 1) * shape.dim * num_tokens * size  # the first block has no residual yet
