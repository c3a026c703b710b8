"""Options of how a run is carried out: ranks, evaluation, checkpoints, guards and logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.options.section import Bool, Count, CountOrZero, Section


class ParallelSection(Section):
    """How the model's states are divided over ranks."""

    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO: 0 divides nothing, 1 optimizer states, 2 gradients too, 3 weights too.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What is kept in the host's memory instead of the GPU's: `optimizer`, fp32 master weights and "
        "moments, which the CPU updates (stages 1 to 3); `parameters`, the divided weights too (stage 3).",
    )
    sequence_parallel_size: Count = Field(
        1,
        description="Neighbouring ranks that share each row: every one has a part of its tokens and, in attention, of "
        "the heads (Ulysses). For rows whose activations do not fit one GPU. It divides the number of ranks, "
        "`data.seq_len` and `model.num_heads`; losses and batches stay the same.",
    )
    nvme_dir: str = Field(
        "", description="Folder on a disk of each node, NVMe by preference, for the masters and moments that `offload` "
        "takes from the GPU (stage 3; DeepSpeed's operator `async_io` needs libaio). Empty: the host's memory."
    )  # fmt: skip
    hpz_ranks: Count = Field(
        1, description="ZeRO++ hpZ: so many ranks in a row, those of a node, hold the weights once more among them and "
        "the backward pass gathers from these (stage 3). Unverified on several nodes. 1: none."
    )  # fmt: skip
    quantize: list[Literal["weights", "gradients"]] = Field(
        [], description="ZeRO++ on GPUs: what is sent rounded, `weights` to 8 bits (qwZ) and, with fp16 only, "
        "`gradients` between nodes to 4 (qgZ), with less exact sums (stage 3). Unverified."
    )  # fmt: skip
    overlap_comm: Bool = Field(
        False,
        description="DeepSpeed sends gradients while the backward pass goes on. Off, because its versions had races: "
        "NaN or wrong gradients, without an error (DeepSpeed #5545, #8061). Compare the losses of both first.",
    )
    timeout_seconds: Count = Field(
        900, description="How long a rank may do one thing without a sign of life before the run ends, and names it."
    )
    start_timeout_seconds: Count = Field(
        1800, description="The same until the first step is over, and while a checkpoint is written."
    )


class EvalSection(Section):
    """Evaluation on held-out documents."""

    every_steps: CountOrZero = Field(0, description="Steps between evaluations; one more at the end. 0: none.")
    max_rows: CountOrZero = Field(0, description="Held-out rows used. 0: all.")
    patience: CountOrZero = Field(
        0, description="Stop early after this many evaluations without improvement. 0: never."
    )
    min_delta: float = Field(0.0, ge=0, description="By how much the held-out loss, in nats, or the metric must get "
                             "better to count as an improvement.")  # fmt: skip
    tasks: dict[str, dict[str, CountOrZero]] = Field(
        {}, description="Tasks of lm-eval done during training, and once more at the end, by name or path of a task "
        "file: each with `every_steps` (by default those of this section), `limit` (documents used; 0: all) and "
        "`num_fewshot` (by default as the task says). Needs `pip install 'longhaul[evals]'`."
    )  # fmt: skip
    metric: Literal["bleu", "rouge", "squad", "roles", "accuracy", "exact"] | None = Field(
        None, description="Let the model answer the examples of the held-out rows, at each evaluation and before the "
        "first step, and score the answers; early stopping and `checkpoint.keep_best` follow the metric then. "
        "docs/tuning.md. Null: none."
    )  # fmt: skip
    sample_every_steps: CountOrZero = Field(
        0, description="Steps between texts that the model writes into `samples/`; one more at the end. 0: none."
    )
    sample_prompts: list[str] = Field(
        [""], min_length=1, description="What those texts go on from; an empty one is the beginning of a document."
    )
    sample_tokens: Count = Field(64, description="Tokens of such a text at most.")
    sample_temperature: float = Field(1.0, ge=0, description="Divides the logits; 0 takes the most probable token.")


class CheckpointSection(Section):
    """Saving."""

    dir: str = Field(
        "", description="Where checkpoints are written: a folder, or a URL of an object store (`s3://`, `gs://`), for "
        "this run alone. Empty: `checkpoints` in the run folder."
    )  # fmt: skip
    every_steps: CountOrZero = Field(
        0, description="Steps between checkpoints; one more at the end. 0: at the end only."
    )
    asynchronous: Bool = Field(
        True,
        description="Write checkpoints beside training, from a copy in the host's memory: 12 bytes a parameter for "
        "AdamW, over all ranks. False: training waits; what the host has already, as with offload, is not copied.",
    )
    keep_last: int = Field(3, ge=2, description="Newest checkpoints that are kept. The one before the newest is needed "
                           "where that is found damaged.")  # fmt: skip
    keep_every: CountOrZero = Field(
        0, description="Checkpoints of steps that are multiples of this are kept for ever. 0: none."
    )
    keep_best: Bool = Field(
        True, description="Save whenever the held-out loss is the lowest so far, and keep that checkpoint."
    )


class ResumeSection(Section):
    """What a run begins with. One whose folder has checkpoints goes on from its own newest."""

    from_: str = Field(
        "", alias="from", description="Run folder, checkpoint in one, or URL of checkpoints or one of them, whose "
        "weights a new run begins with; the model must be the same. Empty: fresh ones."
    )  # fmt: skip
    optimizer: Bool = Field(True, description="Take the optimizer's moments along.")
    schedule: Bool = Field(
        True, description="Take the number of steps and tokens along, and so the place in the learning rate's schedule."
    )
    data: Bool = Field(
        True, description="Go on behind the rows that were trained on; the data up to there must be the same."
    )
    from_scratch: Bool = Field(
        False, description="Set the checkpoints of the run folder aside and begin anew. Only where the last start did "
        "not have this option yet, so that the same command can be started again."
    )  # fmt: skip


class GuardSection(Section):
    """What happens when numbers go wrong."""

    max_skipped_steps: CountOrZero = Field(
        5, description="Updates skipped in a row for non-finite gradients before the run stops with an error."
    )
    check_replicas_every: CountOrZero = Field(
        100,
        description="Steps between comparisons, bit for bit, of what ranks hold alike, and of weights with their fp32 "
        "masters; one more before each checkpoint. A difference is corrupted memory and ends the run with status 69; "
        "the same command goes on from the newest checkpoint. 0: none.",
    )
    spike_sigmas: float = Field(
        8.0, ge=0, description="A step is bad if its loss or gradient norm is so many deviations above the median of "
        "the last 128 good steps; bad ones become the event `spike`. 0: no step is."
    )  # fmt: skip
    spike_steps: int = Field(
        5, ge=1, le=128, description="Bad steps in a row for which the run goes back to a checkpoint before them and "
        "leaves their rows out."
    )  # fmt: skip
    rollback_steps: int = Field(
        50, ge=0, le=1000, description="Steps before the bad ones whose rows are left out with theirs."
    )
    max_rollbacks: CountOrZero = Field(
        3, description="How often it goes back before it stops with an error, unless 128 good steps come between."
    )
    rerun: Bool = Field(
        False, description="Compute what is suspicious once more before anything is left out: a step whose gradients "
        "are not finite, and the steps from the checkpoint to a spike. If it does not come again, a machine had erred."
    )  # fmt: skip


class LogSection(Section):
    """What is shown and written."""

    every_steps: Count = Field(10, description="Steps between lines where the output is not a terminal.")
    layer_norms_every: CountOrZero = Field(
        0, description="Steps between records of each layer's gradient norm and of its activations' root mean square. "
        "0: none."
    )  # fmt: skip
    tensorboard: Bool = Field(True, description="Write TensorBoard events beside `metrics.jsonl`.")
    wandb: str | None = Field(
        None, min_length=1, description="Project on Weights & Biases that gets the metrics too; needs its library "
        "(`pip install 'longhaul[wandb]'`). Null: none."
    )  # fmt: skip
