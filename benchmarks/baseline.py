"""A Transformer as people write it in plain PyTorch: what Longhaul's is compared with.

Same shape, same parameter names and, on rows of one document, same result as `pretrain.transformer.model.Transformer`
(a test compares them), from torch's own layers: `nn.Linear`, `nn.RMSNorm` or `nn.LayerNorm`, causal
`F.scaled_dot_product_attention`, and `F.cross_entropy` over all logits. Run it under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.options.families import ModelShape


class Baseline(nn.Module):
    """A pre-norm decoder-only Transformer; documents of a row see each other, as in most plain code.

    Raises:
        ValueError: the shape has a window, a soft-cap or scaled RoPE, for which there is no plain one-line
            operator, or norms elsewhere than here.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        for name in ("sliding_window", "attention_softcap", "logit_softcap", "rope_scaling"):
            if getattr(shape, name) is not None:
                raise ValueError(f"model.{name} is {getattr(shape, name)}; expected null for the baseline. Remove it.")
        for name, plain in (("norm", ("rmsnorm", "layernorm")), ("qk_norm", (False, True))):
            if getattr(shape, name) not in plain:
                raise ValueError(f"model.{name} is {getattr(shape, name)}; expected one of {plain} for the baseline.")
        self.embedding = nn.Embedding(shape.padded_vocab_size, shape.dim)
        learned = shape.positions == "learned"
        self.position_embedding = nn.Embedding(shape.seq_len, shape.dim) if learned else None
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.final_norm = _norm(shape)
        self.output = nn.Linear(shape.dim, shape.padded_vocab_size, bias=False)
        if shape.tie_embeddings:
            self.output.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, shape.init_std)
        self._loss = self._mean_loss
        if not learned:
            exponents = torch.arange(0, shape.rope_dim, 2).float() / shape.rope_dim
            angles_TR = torch.arange(shape.seq_len).float()[:, None] * (1.0 / shape.rope_theta**exponents)
            self.register_buffer("cos_TC", torch.cat((angles_TR, angles_TR), -1).cos(), persistent=False)
            self.register_buffer("sin_TC", torch.cat((angles_TR, angles_TR), -1).sin(), persistent=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            tokens_BT: int64 token ids.
            targets_BT: int64, the token that follows each one; -100 where it is not scored.
        """
        x_BTD = self.embedding(tokens_BT)
        tables = None
        if self.position_embedding is None:
            tables = self.cos_TC, self.sin_TC
        else:
            x_BTD = x_BTD + self.position_embedding(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD, tables)
        return self._loss(x_BTD, targets_BT)

    def compile_parts(self, backend: str) -> None:
        """Compile the block, once for all layers, and the output layer with its loss.

        The same as compiling all at once but for what is fused across these borders; it takes seconds, not minutes.
        """
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)
        self._loss = torch.compile(self._mean_loss, backend=backend, dynamic=False)

    def _mean_loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.output(self.final_norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def _norm(shape: ModelShape) -> nn.Module:
    kind = nn.RMSNorm if shape.norm == "rmsnorm" else nn.LayerNorm
    return kind(shape.dim, eps=shape.norm_eps)


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Turn the halves of the first features of each head; the others stay."""
    turned, rest = x_BHTC.tensor_split([cos_TC.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC).to(x_BHTC.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class _Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv_dim = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.qkv = nn.Linear(shape.dim, qkv_dim, bias=shape.attention_bias is not False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.output = nn.Linear(shape.num_heads * shape.head_dim, shape.dim, bias=shape.attention_bias is True)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, _ = x_BTD.shape
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = self.qkv(x_BTD).view(B, T, sum(heads), self.head_dim).transpose(1, 2)
        q_BHTC, k_BKTC, v_BKTC = qkv.split(heads, dim=1)
        q_BHTC, k_BKTC = self.q_norm(q_BHTC), self.k_norm(k_BKTC)
        if tables is not None:
            q_BHTC, k_BKTC = rotate(q_BHTC, *tables), rotate(k_BKTC, *tables)
        grouped = self.num_heads != self.num_kv_heads
        out_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=grouped)
        return self.output(out_BHTC.transpose(1, 2).reshape(B, T, -1))


class _SwiGLU(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.dim, 2 * shape.ffn_dim, bias=shape.ffn_bias)
        self.down = nn.Linear(shape.ffn_dim, shape.dim, bias=shape.ffn_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class _GELU(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.dim, shape.ffn_dim, bias=shape.ffn_bias)
        self.down = nn.Linear(shape.ffn_dim, shape.dim, bias=shape.ffn_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = _norm(shape)
        self.attention = _Attention(shape)
        self.ffn_norm = _norm(shape)
        self.ffn = _SwiGLU(shape) if shape.activation == "swiglu" else _GELU(shape)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), tables)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))
