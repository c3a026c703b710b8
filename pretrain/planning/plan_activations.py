"""How much memory a micro-batch's forward and backward pass take beside the states.

B rows of T tokens that n ranks share are N = B T / n tokens of each. What the layers keep is what `layers.py` and
`kernels/` save on a GPU; tests count it on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.loss_chunks import chunk_rows
from pretrain.options.families import ModelShape
from pretrain.planning.plan_shapes import Adapters


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
    chunk_tokens: int = 0, adapters: Adapters | None = None,
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
        adapters: as `adapters_of`; all other weights have no gradients then.
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
    small = 0 if not shape.qk_norm else 8 if shape.qk_norm == "full" else 4 * (H + K)
    attended = H * C * size + 4 * H + scores  # what attention returns, and the logarithms of its sums
    cheap = (4 * D + turned + repeated) * size + small + 2 * norm_bytes  # norms, RoPE
    dear = qkv * size + attended  # products and attention
    if shared_by > 1:  # attention keeps what it got from other ranks, and the product after it what came back
        got = ((H + 2 * max(K, shared_by)) * C + H * C) * size
        cheap -= turned * size
        dear += got
    inner = cheap + dear - 4 * D * size - 2 * norm_bytes - H * C * size  # of attention, between its two products
    if not in_chunks:
        cheap, dear = cheap + F * size, dear + up * size
    unread, narrow, beside = _beside_adapters(shape, adapters, shared_by > 1, in_chunks)
    cheap, narrow = cheap - unread * size, narrow * size
    alone = dear - (0 if shape.qk_norm or shared_by == 1 else qkv * size)  # which is no longer needed then
    behind = shape.norm == "reordered_rmsnorm"  # the norm of what `down` returns keeps that, which no other block does
    block = {"none": cheap + alone + narrow, "selective": dear + (3 * D + behind * D + beside) * size + narrow,
             "full": 2 * D * size, "offload": 0}[mode]  # fmt: skip
    tables = 4 * shape.rope_dim if shape.positions == "rope" else 0
    # The stream before the last norm; with `full`, in place of the first; with `selective`, of the last block's `down`.
    final = 0 if mode == "full" or (mode == "selective" and behind) else D * size
    mask = num_rows * seq_len**2 * size if masked else 0
    stages = (0 if behind else D * size + norm_bytes, inner, (H * C + D) * size + norm_bytes,
              0 if in_chunks else up * size)  # fmt: skip
    ahead = sum(stages[: 1 + _first(adapters)]) if adapters and mode == "none" else 0
    kept = N * (shape.num_layers * block - ahead + final + tables + norm_bytes + 12 * shared_by) + mask
    # `selective` frees one of the products that it kept, and what adapters add to; `offload` has fetched what the block
    # before needs
    again = {"none": 0, "selective": cheap - (D + beside) * size, "full": cheap + alone + narrow,
             "offload": cheap + alone + narrow + 2 * D * size}[mode]  # fmt: skip
    most = max(_backward_bytes(shape, N, size, chunk_tokens if in_chunks else 0, shared_by, adapters))
    classes = shape.padded_vocab_size
    trained_classes = 0 if adapters else classes  # of a frozen output layer there is no gradient
    loss = 4 * (trained_classes + N) * D
    logits = 4 * chunk_rows(N, shape.vocab_size) * shape.vocab_size
    tied = size * classes * D if shape.tie_embeddings and not adapters else 0
    handed_on = size * (trained_classes + N) * D
    return Activations(
        kept=int(kept), loss=loss, loss_peak=max(logits + size * N * D, handed_on), handed_on=handed_on,
        block_peak=int(N * (again - D * size) + most + tied),
    )  # fmt: skip


_ORDER = ("qkv", "attention_output", "ffn_up", "ffn_down")  # of a block's products, as `train.lora.targets` has them


def _first(adapters: Adapters) -> int:
    """Number of the first product of a block beside which an adapter stands: nothing before it has gradients."""
    return min(_ORDER.index(target) for target in adapters.targets)


def _beside_adapters(shape: ModelShape, adapters: Adapters | None, is_shared: bool, in_chunks: bool) -> tuple[int, ...]:
    """Return what adapters change of what a block keeps, in elements a token.

    Returns:
        Inputs that products keep for a gradient of their weights alone, which frozen ones without adapter do not have;
        what is between the two matrices of the adapters; and what their layers return before adapters add to it.
    """
    if adapters is None:
        return 0, 0, 0
    D, F, H, K, C = shape.dim, shape.ffn_dim, shape.num_heads, shape.num_kv_heads, shape.head_dim
    up = 2 * F if shape.activation == "swiglu" else F
    inputs = dict(zip(_ORDER, (D, H * C if is_shared else 0, D, F), strict=True))
    outputs = dict(zip(_ORDER, ((H + 2 * K) * C, D, up, D), strict=True))
    seen = _ORDER[:2] if in_chunks else _ORDER
    adapted = [target for target in seen if target in adapters.targets]
    unread = sum(inputs[target] for target in seen if target not in adapted)
    return unread, adapters.rank * len(adapted), sum(outputs[target] for target in adapted)


def _backward_bytes(
    shape: ModelShape, N: int, size: int, chunk_tokens: int, shared_by: int, adapters: Adapters | None
) -> tuple[int, ...]:
    """Bytes at the moments of a block's backward pass, beside what it kept and less what it has freed by then.

    They are gradients of the residual stream and of what is worked on, and the one of a weight that has just been made.
    """
    D, F, H, K, C = shape.dim, shape.ffn_dim, shape.num_heads, shape.num_kv_heads, shape.head_dim
    up = 2 * F if shape.activation == "swiglu" else F
    brought = H * C if shared_by > 1 else 0
    attention = N * ((2 * H + 2 * K) * C - D - brought) * size + N * H * C * 4
    trained = adapters is None
    down, up_weight = trained * F * D * size, trained * up * D * size
    if chunk_tokens:  # the weights' gradients of the chunks so far, the next one's, and the sum of both
        chunk, so_far = chunk_tokens * size, down + up_weight
        return (
            2 * N * D * size + so_far + 2 * down + chunk * (F + up),
            2 * N * D * size + so_far + 2 * up_weight + chunk * D,
            4 * N * D * size + so_far,  # the input's gradient, likewise
            attention,
        )
    # An adapter gives its input a gradient too, which is added to that of the layer.
    twice_down, twice_up = (
        ("ffn_down" in adapters.targets, "ffn_up" in adapters.targets) if adapters else (False, False)
    )
    freed = F if trained or twice_down else 0
    return (
        N * (D + F + twice_down * F) * size + down,
        N * (D + up + F - freed) * size,  # the activation
        N * (2 * D - freed) * size + up_weight,
        N * (3 * D - freed - up) * size if twice_up else 0,
        attention - N * (up + freed) * size,
    )


def offloaded_bytes(shape: ModelShape, num_tokens: int, size: int) -> int:
    """Bytes of the blocks' inputs in the host's memory, with `train.activation_checkpointing: offload`.

    Torch may take up to twice as much: it rounds what is pinned up to a power of two.
    """
    return (2 * shape.num_layers - 1) * shape.dim * num_tokens * size  # the first block has no residual yet
