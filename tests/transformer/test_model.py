import math
from collections import Counter as Counts

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.options.config import ModelSection
from pretrain.options.families import resolve_shape
from pretrain.ranks.sequence_parallel import ALONE
from pretrain.transformer.model import KVCache, Transformer

LLAMA = {"family": "llama", "num_kv_heads": 2}
GPT2 = {"family": "gpt2"}
QWEN3 = {"family": "qwen3", "num_kv_heads": 2, "head_dim": 10, "sliding_window": 5}
OLMO2 = {"family": "olmo2", "num_kv_heads": 2}
STABLELM = {"family": "stablelm", "attention_bias": "qkv", "num_kv_heads": 1, "rope_fraction": 0.5,
            "rope_scaling": {"type": "llama3", "factor": 4.0, "original_seq_len": 12}}  # fmt: skip
STARCODER2 = {"family": "starcoder2", "sliding_window": 6,
              "rope_scaling": {"type": "yarn", "factor": 2.0, "original_seq_len": 12}}  # fmt: skip
CUSTOM = {"family": "custom", "norm": "layernorm", "positions": "learned", "qk_norm": True, "attention_bias": "qkv",
          "ffn_bias": True, "attention_softcap": 1.5, "logit_softcap": 4.0, "sliding_window": 9, "num_kv_heads": 2}  # fmt: skip
ALL = [LLAMA, GPT2, QWEN3, OLMO2, STABLELM, STARCODER2, CUSTOM]
FAMILIES = pytest.mark.parametrize("options", ALL, ids=[options["family"] for options in ALL])
VOCAB, LENGTH = 300, 24


def build(options=LLAMA, seed=1, checkpointing="none", group=ALONE, ffn_chunk_tokens=0, **more):
    section = ModelSection(**({"dim": 32, "num_layers": 2, "num_heads": 4} | options | more))
    shape = resolve_shape(section, VOCAB, LENGTH)
    return Transformer(shape, seed, checkpointing, group=group, ffn_chunk_tokens=ffn_chunk_tokens)


def sharpen(model, std=0.2):
    """Give weights at which every part of the model matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, std)
    return model


def batch(rows=2, seed=0, ends=((7, 15, 24), (24,))):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    targets = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    starts = torch.zeros(rows, LENGTH, dtype=torch.int32)
    for row in range(rows):
        begin = 0
        for end in ends[row % len(ends)]:
            starts[row, begin:end] = begin
            targets[row, end - 1] = -100
            begin = end
    return tokens, targets, starts


def naive_frequencies(s):
    """Return what each pair turns by one position, in the words of the papers, and the factor of sines and cosines."""
    half, scaling = int(s.head_dim * s.rope_fraction) // 2, s.rope_scaling
    plain = s.rope_theta ** -(torch.arange(half).double() / half)
    if scaling is None:
        return plain, 1.0
    if scaling.type == "llama3":
        rounds = scaling.original_seq_len * plain / (2 * math.pi)
        kept = ((rounds - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
        return kept * plain + (1 - kept) * plain / scaling.factor, 1.0
    pair = lambda turns: half * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / math.log(s.rope_theta)  # noqa: E731
    begin, end = max(math.floor(pair(scaling.beta_fast)), 0), math.ceil(pair(scaling.beta_slow))
    kept = 1 - ((torch.arange(half).double() - begin) / (end - begin)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor, 0.1 * math.log(scaling.factor) + 1.0


def naive_losses(model, tokens, targets):
    """Compute the losses of one document by another route: no packing, no kernels, no fused projections."""
    s, p = model.shape, dict(model.named_parameters())
    linear = lambda x, name: F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))  # noqa: E731

    def norm(x, name):
        if s.norm == "layernorm":
            return F.layer_norm(x, (s.dim,), p[f"{name}.weight"], p[f"{name}.bias"], s.norm_eps)
        return F.rms_norm(x, (s.dim,), p[f"{name}.weight"], s.norm_eps)

    def rotate(x):  # complex form of RoPE: pairs (i, i + C/2)
        half = int(s.head_dim * s.rope_fraction) // 2
        frequencies, magnitude = naive_frequencies(s)
        angles = torch.outer(torch.arange(len(x)).double(), frequencies)
        turned = (
            torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
            * torch.polar(magnitude + 0 * angles, angles)[:, None]
        )
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1).float()

    T, H, K, C = len(tokens), s.num_heads, s.num_kv_heads, s.head_dim
    x = p["embedding.weight"][tokens]
    if s.positions == "learned":
        x = x + p["position_embedding.weight"][:T]
    for i in range(s.num_layers):
        name = f"blocks.{i}"
        before = (lambda x, name: x) if s.norm == "reordered_rmsnorm" else norm
        after = norm if s.norm == "reordered_rmsnorm" else (lambda x, name: x)
        q, k, v = linear(before(x, f"{name}.attention_norm"), f"{name}.attention.qkv").split((H * C, K * C, K * C), -1)
        if s.qk_norm == "full":
            q = F.rms_norm(q, (H * C,), p[f"{name}.attention.q_norm.weight"], s.norm_eps)
            k = F.rms_norm(k, (K * C,), p[f"{name}.attention.k_norm.weight"], s.norm_eps)
        q, k, v = q.view(T, H, C), k.view(T, K, C), v.view(T, K, C)
        if s.qk_norm is True:
            q, k = (
                F.rms_norm(x, (C,), p[f"{name}.attention.{part}_norm.weight"], s.norm_eps)
                for x, part in ((q, "q"), (k, "k"))
            )
        if s.positions == "rope":
            q, k = rotate(q), rotate(k)
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        scores = torch.einsum("thc,shc->hts", q, k) / math.sqrt(C)
        if s.attention_softcap:
            scores = s.attention_softcap * torch.tanh(scores / s.attention_softcap)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        scores = scores.masked_fill((distance < 0) | (distance >= (s.sliding_window or T)), -math.inf)
        mixed = torch.einsum("hts,shc->thc", scores.softmax(-1), v).reshape(T, H * C)
        x = x + after(linear(mixed, f"{name}.attention.output"), f"{name}.attention_norm")
        h = before(x, f"{name}.ffn_norm")
        if s.activation == "swiglu":
            gate, up = linear(h, f"{name}.ffn.gate_up").split(s.ffn_dim, -1)
            x = x + after(linear(F.silu(gate) * up, f"{name}.ffn.down"), f"{name}.ffn_norm")
        else:
            x = x + linear(F.gelu(linear(h, f"{name}.ffn.up"), approximate="tanh"), f"{name}.ffn.down")
    output = p["embedding.weight" if s.tie_embeddings else "output.weight"]
    logits = (norm(x, "final_norm") @ output.T)[:, : s.vocab_size]
    if s.logit_softcap:
        logits = s.logit_softcap * torch.tanh(logits / s.logit_softcap)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)


@FAMILIES
def test_losses_equal_an_independent_implementation(options):
    model = sharpen(build(options))
    tokens, targets, starts = batch()
    losses = model.token_losses(tokens, targets, starts)
    for row, begin, end in ((0, 0, 7), (0, 7, 15), (0, 15, 24), (1, 0, 24)):
        expected = naive_losses(model, tokens[row, begin:end], targets[row, begin:end])
        torch.testing.assert_close(losses[row, begin:end], expected.detach(), rtol=1e-4, atol=1e-4)
    total, _ = model(tokens, targets, starts)
    assert total.dtype == torch.float32 and total.dim() == 0
    torch.testing.assert_close(total, losses.sum())


@FAMILIES
def test_gradients_equal_those_of_an_independent_implementation(options):
    model = sharpen(build(options), std=0.1)
    tokens, targets, starts = batch(rows=1)
    model(tokens, targets, starts)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(naive_losses(model, tokens[0, a:b], targets[0, a:b]).sum() for a, b in ((0, 7), (7, 15), (15, 24))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@FAMILIES
def test_parameter_names(options):
    shape, biased = build(options).shape, ["weight", "bias"]
    norm = biased if shape.norm == "layernorm" else ["weight"]
    parts = {
        "attention_norm": norm,
        "attention.qkv": biased if shape.attention_bias else ["weight"],
        "attention.q_norm": ["weight"] if shape.qk_norm else [],
        "attention.k_norm": ["weight"] if shape.qk_norm else [],
        "attention.output": biased if shape.attention_bias is True else ["weight"],
        "ffn_norm": norm,
        "ffn.gate_up" if shape.activation == "swiglu" else "ffn.up": biased if shape.ffn_bias else ["weight"],
        "ffn.down": biased if shape.ffn_bias else ["weight"],
    }
    expected = ["embedding.weight", *(["position_embedding.weight"] if shape.positions == "learned" else [])]
    expected += [f"blocks.{i}.{part}.{kind}" for i in range(2) for part, kinds in parts.items() for kind in kinds]
    expected += [f"final_norm.{kind}" for kind in norm] + ([] if shape.tie_embeddings else ["output.weight"])
    assert [name for name, _ in build(options).named_parameters()] == expected
    vectors = {name for name, parameter in build(options).named_parameters() if parameter.dim() == 1}
    assert vectors == {name for name in expected if name.endswith("bias") or "norm" in name}  # these do not decay


@FAMILIES
def test_documents_do_not_see_each_other(options):
    model = sharpen(build(options))
    tokens, targets, starts = batch()
    before = model.token_losses(tokens, targets, starts)
    changed = tokens.clone()
    changed[0, 7:15] = (changed[0, 7:15] + 1) % VOCAB
    after = model.token_losses(changed, targets, starts)
    assert torch.equal(before[0, :7], after[0, :7]) and torch.equal(before[0, 15:], after[0, 15:])
    assert not torch.equal(before[0, 7:15], after[0, 7:15])


@FAMILIES
def test_a_token_does_not_see_later_ones(options):
    model = sharpen(build(options))
    tokens, targets, starts = batch(ends=((24,),))
    before = model.token_losses(tokens, targets, starts)
    tokens[:, 10:] = (tokens[:, 10:] + 1) % VOCAB
    assert torch.equal(before[:, :10], model.token_losses(tokens, targets, starts)[:, :10])


@FAMILIES
def test_losses_of_a_document_do_not_depend_on_its_place_in_the_row(options):
    model = sharpen(build(options))
    tokens, targets, starts = batch(rows=1)
    order = torch.cat((torch.arange(15, 24), torch.arange(0, 7), torch.arange(7, 15)))
    moved_starts = torch.tensor([[0] * 9 + [9] * 7 + [16] * 8])
    losses = model.token_losses(tokens, targets, starts)
    moved = model.token_losses(tokens[:, order], targets[:, order], moved_starts)
    torch.testing.assert_close(moved, losses[:, order], rtol=1e-5, atol=1e-5)


@FAMILIES
def test_loss_at_the_start_is_that_of_guessing(options):
    model = build(options)
    tokens, targets, starts = batch()
    loss = model(tokens, targets, starts)[0] / (targets != -100).sum()
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.1)


@pytest.mark.parametrize(
    "options", [LLAMA | {"attention_bias": True}, QWEN3, STABLELM], ids=["llama", "qwen3", "stablelm"]
)
def test_initial_values(options):
    model = build(options, dim=128, num_layers=3, num_heads=4, head_dim=None)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            used = parameter[:VOCAB] if name in ("embedding.weight", "output.weight") else parameter
            scale = math.sqrt(6) if name.endswith(("attention.output.weight", "down.weight")) else 1.0
            assert used.std().item() == pytest.approx(0.02 / scale, rel=0.05)
            assert abs(used.mean().item()) < 1e-3
    assert (model.embedding.weight[VOCAB:] == 0).all() and (model.output.weight[VOCAB:] == 0).all()


def test_initial_values_are_keyed_by_seed_and_name():
    deep, shallow, other = build(num_layers=3), build(num_layers=2), build(seed=2)
    assert torch.equal(deep.blocks[1].attention.qkv.weight, shallow.blocks[1].attention.qkv.weight)
    assert not torch.equal(shallow.embedding.weight, other.embedding.weight)
    assert not torch.equal(shallow.blocks[0].attention.qkv.weight, shallow.blocks[1].attention.qkv.weight)
    torch.manual_seed(5)
    assert torch.equal(build().embedding.weight, shallow.embedding.weight)


def test_tied_weights_are_one_parameter_stored_once():
    model = build(GPT2)
    assert model.output.weight is model.embedding.weight
    assert "output.weight" not in dict(model.named_parameters()) and "output.weight" not in model.state_dict()
    other = build(GPT2, seed=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.output.weight, model.embedding.weight)
    untied = build(GPT2, tie_embeddings=False)
    assert "output.weight" in untied.state_dict() and untied.output.weight is not untied.embedding.weight


@FAMILIES
def test_from_the_meta_device(options):
    with torch.device("meta"):
        model = build(options)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu").initialise()
    for (name, a), (_, b) in zip(model.named_parameters(), build(options).named_parameters(), strict=True):
        assert torch.equal(a, b), name
    if options in (GPT2, STARCODER2):
        assert model.output.weight is model.embedding.weight


@FAMILIES
def test_bf16_stays_near_fp32(options):
    tokens, targets, starts = batch()
    wide = build(options, init_std=0.1)
    exact, _ = wide(tokens, targets, starts)
    narrow = build(options, init_std=0.1).bfloat16()
    loss, _ = narrow(tokens, targets, starts)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in narrow.parameters())


@FAMILIES
def test_activation_checkpointing_changes_nothing(options):
    tokens, targets, starts = batch()
    losses, grads = [], []
    for kind in ("none", "full", "selective"):
        model = build(options, checkpointing=kind, dropout=0.2, attention_dropout=0.2)
        loss, _ = model(tokens, targets, starts, torch.tensor([3, 4]), 7)
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    for other in (1, 2):
        assert torch.equal(losses[0], losses[other])
        assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[other], strict=True))


class Counter(TorchDispatchMode):
    """Counts calls of operators by name, and what they return, in elements."""

    def __init__(self):
        super().__init__()
        self.calls = Counts()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.__name__.partition(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


@FAMILIES
def test_selective_checkpointing_repeats_no_product_and_keeps_less(options):
    tokens, targets, starts = batch()
    calls, kept = {}, {}
    for kind in ("none", "selective", "full"):
        model = build(options, checkpointing=kind)
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, _ = model(tokens, targets, starts)
        kept[kind] = sum(sizes)
        with Counter() as counter:
            loss.backward()
        calls[kind] = counter.calls
    products = {kind: sum(found[name] for name in ("mm", "addmm", "bmm")) for kind, found in calls.items()}
    assert products["none"] == products["selective"] < products["full"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert calls["selective"][attention] == calls["none"][attention] == 0
    assert calls["full"][attention] > 0 or "attention_softcap" in options  # which is matrix products
    assert calls["none"]["rsqrt"] + calls["none"]["native_layer_norm"] < (
        calls["selective"]["rsqrt"] + calls["selective"]["native_layer_norm"]
    )
    assert kept["full"] <= kept["selective"] < kept["none"]


@FAMILIES
def test_dropout_does_not_depend_on_the_batch_that_a_row_is_in(options):
    tokens, targets, starts = batch()
    ids = torch.tensor([2**31 + 5, 11])
    model = sharpen(build(options, dropout=0.3, attention_dropout=0.3), std=0.1)
    together, _ = model(tokens, targets, starts, ids, 3)
    together.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = [model(tokens[i : i + 1], targets[i : i + 1], starts[i : i + 1], ids[i : i + 1], 3)[0] for i in (0, 1)]
    (apart[0] + apart[1]).backward()
    torch.testing.assert_close(together, apart[0] + apart[1])
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_dropout_varies_with_the_step_and_the_row_and_stops_in_evaluation():
    tokens, targets, starts = batch()
    model, ids = build(dropout=0.3), torch.tensor([1, 2])
    loss, _ = model(tokens, targets, starts, ids, 0)
    assert torch.equal(loss, model(tokens, targets, starts, ids, 0)[0])
    assert not torch.equal(loss, model(tokens, targets, starts, ids, 1)[0])
    assert not torch.equal(loss, model(tokens, targets, starts, ids + 2, 0)[0])
    plain = model.token_losses(tokens, targets, starts).sum()
    model.eval()
    torch.testing.assert_close(model(tokens, targets, starts, ids, 0)[0], plain)


@FAMILIES
def test_cached_logits_equal_uncached_ones(options):
    model = sharpen(build(options))
    tokens = batch()[0]
    whole = model.logits(tokens)
    assert whole.shape == (2, LENGTH, VOCAB) and whole.dtype == torch.float32 and not whole.requires_grad
    cache = KVCache(model.shape, torch.zeros(2, dtype=torch.int64), LENGTH, torch.float32)
    pieces = [model.logits(tokens[:, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 11), (11, 24))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(tokens, last_only=True), whole[:, -1:])


@FAMILIES
def test_left_padding_changes_nothing(options):
    model = sharpen(build(options))
    tokens = batch()[0]
    padded = torch.cat((torch.full((2, 4), 3), tokens[:, :10]), 1)
    cache = KVCache(model.shape, torch.tensor([4, 4]), 14, torch.float32)
    torch.testing.assert_close(model.logits(padded, cache)[:, 4:], model.logits(tokens[:, :10]), rtol=1e-4, atol=1e-4)


def test_logits_are_those_of_the_loss():
    model = sharpen(build())
    tokens, targets, _ = batch()
    expected = F.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets, torch.zeros_like(tokens))[0].detach(), expected)


@pytest.mark.parametrize("options", [QWEN3, STARCODER2, CUSTOM], ids=["qwen3", "starcoder2", "custom"])
def test_cached_logits_equal_uncached_ones_far_beyond_the_window(options):
    model = sharpen(build(options, sliding_window=4))
    tokens = batch()[0]
    whole = model.logits(tokens)
    cache = KVCache(model.shape, torch.zeros(2, dtype=torch.int64), LENGTH, torch.float32)
    steps = [model.logits(tokens[:, i : i + 1], cache) for i in range(LENGTH)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    unlimited = sharpen(build(options, sliding_window=None)).logits(tokens)
    torch.testing.assert_close(unlimited[:, :4], whole[:, :4], rtol=1e-4, atol=1e-4)
    assert (unlimited[:, 4:] - whole[:, 4:]).abs().amax(-1).min() > 1e-3


def test_generation_and_the_loss_see_the_capped_logits():
    model, free = sharpen(build(CUSTOM)), sharpen(build(CUSTOM, logit_softcap=None))
    tokens, targets, starts = batch(ends=((24,),))
    capped, plain = model.logits(tokens), free.logits(tokens)
    assert plain.abs().max() > 4.0 > capped.abs().max()
    torch.testing.assert_close(capped, 4.0 * torch.tanh(plain / 4.0))
    expected = F.cross_entropy(capped.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model.token_losses(tokens, targets, starts).flatten(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, targets, starts)[1], expected.sum(), rtol=1e-4, atol=1e-4)


def test_a_token_sees_as_far_as_the_windows_of_all_blocks_reach():
    model = sharpen(build(QWEN3, sliding_window=4))  # two blocks: 3 + 3 tokens back
    tokens = batch(ends=((24,),))[0]
    before = model.logits(tokens)
    tokens[:, 10] = (tokens[:, 10] + 1) % VOCAB
    changed = (model.logits(tokens) != before).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == list(range(10, 17))
