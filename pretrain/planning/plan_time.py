"""How long a training step takes: products, attention, what memory is read and written for, collectives, the host.

Nothing here has been measured on a GPU by us. `ASSUMPTIONS` says what is assumed, docs/planning.md why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.loss_chunks import chunk_rows
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, flops_per_token
from pretrain.planning.plan_activations import offloaded_bytes
from pretrain.planning.plan_communication import Collective, collectives, gathered_weights
from pretrain.planning.plan_memory import Layout, layout_of, shape_of
from pretrain.planning.plan_shapes import Adapters, adapters_of
from pretrain.ranks.gpus import Gpu


@dataclass(frozen=True)
class Assumptions:
    """What is not on a data sheet.

    Args:
        sustained: of what the largest products reach alone, what those of a long run do: power, shapes.
        attention_forward, attention_backward: FLOP/s of attention, of the data sheet's.
        bandwidth: of a GPU's memory that kernels reach.
        link: of NVLink, PCIe and networks that collectives reach.
        hop_seconds: that a collective takes for each further GPU of a node in its ring.
        node_seconds: and for each further node.
        kernel_seconds: that the host takes to start a kernel.
        hook_seconds: that DeepSpeed takes around each module at stage 3.
        hidden: of what `parallel.overlap_comm` lets run beside the passes, the part that is hidden.
        host_bandwidth: GB/s of a rank's share of the host's memory, where the update is offloaded.
        host_link: GB/s between GPU and host.
    """

    sustained: float = 0.85
    attention_forward: float = 0.45
    attention_backward: float = 0.35
    bandwidth: float = 0.85
    link: float = 0.8
    hop_seconds: float = 3e-6
    node_seconds: float = 10e-6
    kernel_seconds: float = 6e-6
    hook_seconds: float = 60e-6
    hidden: float = 0.7
    host_bandwidth: float = 20.0
    host_link: float = 20.0


ASSUMPTIONS = Assumptions()
_KERNELS_OF_BLOCK = {
    "none": 32,
    "selective": 42,
    "full": 44,
    "offload": 48,
}  # forward and backward; norms with a sum count once
_KERNELS_OF_CHUNK = 20  # a further one of the feed-forward
_KERNELS_OF_EXCHANGE = 16  # copies around attention, and collectives
_KERNELS_OF_ADAPTER = 7  # forward and backward, less the gradient of the weight that it stands beside


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run.

    Args:
        name: of the GPU, in the table.
        gpu: what it can do.
        num_gpus: of the run, one rank each.
        gpus_per_node: at most.
        network: GB/s to other nodes for each GPU, in one direction.
        price: dollars an hour for each GPU; None: not known.
        host_bytes: memory of each node's host.
    """

    name: str
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    network: float
    price: float | None
    host_bytes: float = math.inf

    @property
    def num_nodes(self) -> int:
        """Machines that the GPUs are in."""
        return -(-self.num_gpus // self.gpus_per_node)

    def peak(self, precision: str) -> float:
        """FLOP/s by the data sheet."""
        return self.gpu.flops_fp32 if precision == "fp32" else self.gpu.flops

    def bus(self, num_nodes: int) -> float:
        """Bytes a second that each rank of a ring over so many nodes sends; it leaves a node by all of its networks."""
        inside, across = self.gpu.link * 1e9, self.network * 1e9 * min(self.gpus_per_node, self.num_gpus)
        return inside if num_nodes == 1 else min(inside, across)

    def pairs(self, num_nodes: int) -> float:
        """Bytes a second that each rank sends to all others on so many nodes: to other nodes by its own network."""
        return (self.gpu.link if num_nodes == 1 else min(self.gpu.link, self.network)) * 1e9

    @property
    def masks_attention(self) -> bool:
        """Whether PyTorch's attention runs, with a mask, because our programs need a newer GPU."""
        return 0 < self.gpu.capability < 8.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on; they add up to `total`.

    `host` is what the GPU waits for the host: to start kernels, to take and give activations, to give weights.
    """

    matmul: float
    attention: float
    memory: float
    update: float
    communication: float
    host: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.matmul + self.attention + self.memory + self.update + self.communication + self.host


def step_time(config: Config, plan: BatchPlan, machine: Machine, assumed: Assumptions = ASSUMPTIONS) -> StepTime:
    """Foresee how long a step takes.

    Args:
        config: of the run.
        plan: its rows on the ranks.
        machine: the GPUs.
        assumed: what is not on a data sheet.
    """
    shape, at, adapters = shape_of(config), layout_of(config, machine.num_gpus), adapters_of(config)
    N, mode = plan.tokens_of_micro_step, config.train.activation_checkpointing
    chunks = -(-N // (config.train.ffn_chunk_tokens or N))
    peak, repeats = machine.peak(config.train.precision), plan.num_micro_steps
    bandwidth = machine.gpu.bandwidth * 1e9 * assumed.bandwidth
    matmul = repeats * _matmul_seconds(
        shape, N, at.size, mode, chunks, peak * machine.gpu.matmul * assumed.sustained, bandwidth, adapters
    )
    attention = repeats * _attention_seconds(shape, N, plan.seq_len, mode, peak, assumed)
    memory = repeats * _memory_bytes(shape, N, at, mode, plan.sequence_parallel_size) / bandwidth
    update = _update_seconds(at, repeats, bandwidth, assumed)
    passes = matmul + attention + memory
    exposed = _communication_seconds(collectives(config, plan), config, machine, passes, assumed)
    kernels = _KERNELS_OF_BLOCK[mode] + _KERNELS_OF_CHUNK * (chunks - 1)
    kernels += _KERNELS_OF_EXCHANGE if plan.sequence_parallel_size > 1 else 0
    kernels += _KERNELS_OF_ADAPTER * len(adapters.targets) if adapters else 0
    blocks = shape.num_layers * (kernels * assumed.kernel_seconds
                                 + (12 * assumed.hook_seconds if at.stage == 3 else 0.0))  # fmt: skip
    waiting = max(0.0, repeats * blocks - passes)  # the host runs ahead of the GPU: only what it is slower by
    if mode == "offload":  # one way beside the forward passes, the other beside the backward passes, of 1 to 3
        copying = repeats * offloaded_bytes(shape, N, at.size) / (assumed.host_link * 1e9)
        waiting += max(0.0, copying - passes / 4) + max(0.0, copying - passes * 3 / 4)
    if at.offload == "parameters":
        fetched = repeats * at.size * gathered_weights(config, at.ranks) / at.ranks
        waiting += fetched / (assumed.host_link * 1e9)
    return StepTime(matmul, attention, memory, update, exposed, waiting)


def utilisation(config: Config, plan: BatchPlan, machine: Machine, seconds: float) -> tuple[float, float]:
    """Model FLOPs utilisation of a step of this length: by the peers' convention, and with causal attention once."""
    shape = shape_of(config)
    rate = plan.tokens_per_step / seconds / (machine.peak(config.train.precision) * machine.num_gpus)
    frozen = config.train.lora is not None
    return rate * flops_per_token(shape, False, frozen), rate * flops_per_token(shape, True, frozen)


def _matmul_seconds(
    shape: ModelShape, N: int, size: int, mode: str, chunks: int, reached: float, bandwidth: float,
    adapters: Adapters | None,
) -> float:  # fmt: skip
    """Seconds of a micro-step's products: computing, and what is read and written once, one after the other.

    They overlap in truth, and tiles read more than once; the two errors are of one size, and small products thus take
    a smaller part of the peak.
    """
    rank, targets = (adapters.rank, adapters.targets) if adapters else (0, ())

    def product(inputs: int, outputs: int, times: float, parts: int = 1) -> float:
        computing = 2.0 * N * inputs * outputs / reached
        moving = (N * inputs + N * outputs + parts * inputs * outputs) * size / bandwidth
        adding = 3.0 * (parts - 1) * inputs * outputs * size / bandwidth  # gradients of the parts
        return times * (computing + moving) + adding

    def layer(target: str, inputs: int, outputs: int, times: float, parts: int = 1) -> float:
        if target in targets:  # beside it the two matrices of an adapter, which are trained
            beside = product(inputs, rank, times, parts) + product(rank, outputs, times, parts)
            return product(inputs, outputs, times - 1) + beside
        return product(inputs, outputs, times - 1) if adapters else product(inputs, outputs, times, parts)

    D, F, C = shape.dim, shape.ffn_dim, shape.head_dim
    times = 4.0 if mode in ("full", "offload") else 3.0  # forward, two backward (one of them for weights), and again
    block = layer("qkv", D, (shape.num_heads + 2 * shape.num_kv_heads) * C, times)
    block += layer("attention_output", shape.num_heads * C, D, times)
    times = 4.0 if chunks > 1 else times
    block += layer("ffn_up", D, F * (2 if shape.activation == "swiglu" else 1), times, chunks)
    block += layer("ffn_down", F, D, times, chunks)
    return shape.num_layers * block + product(D, shape.padded_vocab_size, 2.0 if adapters else 3.0)


def _attention_seconds(shape: ModelShape, N: int, seq_len: int, mode: str, peak: float, assumed: Assumptions) -> float:
    """Seconds of a micro-step's attention, if each row is one document."""
    seen = seq_len / 2 if shape.sliding_window is None else min(shape.sliding_window, seq_len / 2)
    forward = 4.0 * N * shape.num_heads * shape.head_dim * seen
    times = 2 if mode in ("full", "offload") else 1
    seconds = times * forward / (peak * assumed.attention_forward) + 2.5 * forward / (peak * assumed.attention_backward)
    return shape.num_layers * seconds


def _memory_bytes(shape: ModelShape, N: int, at: Layout, mode: str, shared_by: int) -> float:
    """Bytes that are read and written in a micro-step by all that is no product and no attention."""
    D, F, H, K, C = shape.dim, shape.ffn_dim, shape.num_heads, shape.num_kv_heads, shape.head_dim
    gated = shape.activation == "swiglu"
    norms_forward, norms_backward = 2 * 4 * D, 2 * 4 * D  # two norms, each with the sum before it
    turned = 2 * (H + K) * C if shape.positions == "rope" or shape.qk_norm else 0
    forward = norms_forward + turned + (3 * F if gated else 2 * F)
    backward = norms_backward + turned + 2 * (H + 2 * K) * C + (5 * F if gated else 3 * F)
    backward += 4 * H * C  # attention's row sums, and gradients of queries summed in fp32 and rounded
    if shared_by > 1:  # put in order to be sent, and what came likewise
        exchanged = 4 * (2 * H + 2 * max(K, shared_by)) * C
        forward, backward = forward + exchanged, backward + exchanged
    again = forward if mode != "none" else 0
    blocks = shape.num_layers * (forward + backward + again) * at.size
    loss = 4.0 * 4 * shape.vocab_size  # logits are written, read twice and written over, in fp32
    chunks = -(-N // chunk_rows(N, shape.vocab_size))
    head = (2 * chunks + 2) * 4.0 * shape.padded_vocab_size * D  # its gradient is added to by each chunk
    gradients = 0.0
    if at.kind == "summed":
        gradients = (2 * at.size + 2 * 4 + at.size) * at.total  # made, added in fp32, cleared
    elif at.kind == "divided":
        gradients = (3 * at.size + 2 * at.grad_size) * at.total
    elif at.kind == "weights":
        gathered = 2 * at.size * at.weights  # put in place
        gradients = (2 * at.size + 4 * at.grad_size) * at.total + gathered
    return N * (blocks + loss + 8 * D * at.size) + head + gradients


def _update_seconds(at: Layout, repeats: int, bandwidth: float, assumed: Assumptions) -> float:
    """Seconds of norm, clipping and optimizer, which reads and writes masters and moments."""
    share = at.total / at.ranks
    states = (8 * (1 + at.num_states) + 4) * share  # each read and written, and gradients read
    if at.offload != "none":
        moved = (at.grad_size * repeats + at.size) * share
        return (states + 8 * share) / (assumed.host_bandwidth * 1e9) + moved / (assumed.host_link * 1e9)
    # Of stage 1 in bf16 all of the sums are on every rank: normed, clipped and cleared.
    sums = (4 + 8 + 4) * (at.total if at.kind in ("plain", "summed") else share)
    return (states + sums + at.size * share) / bandwidth


def _communication_seconds(
    found: list[Collective], config: Config, machine: Machine, passes: float, assumed: Assumptions
) -> float:
    """Seconds that collectives keep a step waiting."""
    if machine.num_gpus == 1:
        return 0.0
    seconds = {"passes": 0.0, "gradients": 0.0, "update": 0.0, "waited": 0.0}
    for one in found:
        ranks = one.sharers or machine.num_gpus
        nodes, per_node = -(-ranks // machine.gpus_per_node), min(machine.gpus_per_node, ranks)
        if one.name == "all_reduce":
            latency = 2 * (per_node - 1) * assumed.hop_seconds + 2 * math.log2(nodes) * assumed.node_seconds
        else:
            latency = nodes * ((per_node - 1) * assumed.hop_seconds + (assumed.node_seconds if nodes > 1 else 0.0))
        bus = machine.bus(nodes) if one.sharers is None else machine.pairs(nodes)
        seconds[one.when] += one.wire_bytes(ranks) / (bus * assumed.link) + one.count * latency
    if config.parallel.overlap_comm:
        seconds["passes"] -= min(seconds["passes"] * assumed.hidden, passes)
    return sum(seconds.values())
