"""Every option of Longhaul: what it means, its range and its default.

`docs/config.md` is generated from these models. Reading YAML, overrides and error messages are in
`settings.py`; checks that need several sections are in `checks.py`; arithmetic with the number of ranks
is in `batch_plan.py`. Sections of their own files: `model_options.py`, `run_options.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.options.model_options import ModelSection
from pretrain.options.run_options import (
    CheckpointSection,
    EvalSection,
    GuardSection,
    LogSection,
    ParallelSection,
    ResumeSection,
)
from pretrain.options.section import Amount, Bool, Count, CountOrZero, Probability, Section


class RunSection(Section):
    """Where the run lives and what makes it reproducible."""

    dir: str = Field("", description="Run folder. Empty: `runs/<name of the config file>`.")
    seed: CountOrZero = Field(1, lt=2**32, description="Seed of initialisation, data order, dropout and sampling.")
    allow_changes: list[str] = Field(
        [], description="Options that may differ from the run folder's config when a run goes on, such as `optim.lr`."
    )


class TokenizerSection(Section):
    """The tokenizer; `prepare` trains a sentencepiece model if the file does not exist."""

    model: str = Field(
        description="A sentencepiece model file, or Hugging Face's `tokenizer.json`, or the folder that holds one."
    )
    kind: Literal["bpe", "unigram"] = Field("bpe", description="What is trained if the file does not exist.")
    vocab_size: int = Field(ge=300, le=2**20, description="Number of token ids, special and byte ones included.")
    sample_bytes: int = Field(
        100_000_000, ge=10_000, description="Bytes of text that it is trained on; memory is about 15 times this."
    )
    character_coverage: float = Field(
        0.99995, gt=0.9, le=1.0, description="Share of characters that get pieces of their own; the rest are bytes."
    )
    bos: str | None = Field(
        None, description="Token that begins documents. Null: the one that the tokenizer names, or else eos."
    )
    eos: str | None = Field(None, description="Token that ends documents. Null: the one that the tokenizer names.")


class AugmentSection(Section):
    """Changes of what a source's documents look like in training; what is to be predicted stays. docs/tuning.md."""

    token_dropout: Probability = Field(
        0.0, description="Share of input tokens that become the unknown one (where there is none, padding), others in "
        "every epoch."
    )  # fmt: skip
    span_shuffle: Probability = Field(
        0.0,
        description="Share of the spans of 1 to 5 tokens in prompts that change places with the next one, likewise.",
    )
    back_translation: str = Field(
        "", description="File of other wordings of the source's documents, made elsewhere and trained on beside them: "
        "JSON lines of `original` and `paraphrase`, each an object as a line of the source is."
    )  # fmt: skip


class ExamplesSection(Section):
    """What is asked and answered in a source for tuning: each `.jsonl` line is a conversation, or prompt and response.

    Training scores the answers only, and the token that ends each; docs/tuning.md.
    """

    template: str = Field(
        "{prompt}", description="What a prompt is made of: text with fields of the line in braces; `{{` is a brace."
    )
    response: str = Field("response", min_length=1, description="Field that holds the response.")
    messages: str = Field(
        "messages", min_length=1, description="Field that holds a conversation, if a line has one: messages, each with "
        "a `role` (system, user, assistant) and its `content`, which the tokenizer's chat template puts together."
    )  # fmt: skip


class SourceSection(Section):
    """One corpus: raw text that `prepare` turns into shards, or shards that exist."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the corpus; fixes its shuffling.")
    paths: list[str] = Field(
        [], description="What `prepare` reads: files, folders or globs of text, `.jsonl`, `.csv`, `.tsv` and `.tar`, "
        "each `.gz`, `.zst` or `.bz2` too, of `.parquet`, of folders that `datasets` saved, of Wikipedia's dumps, "
        "SQuAD or IMDB, or of Megatron's or nanoGPT's token ids; or `python-stdlib:`. Empty: the shards exist already."
    )  # fmt: skip
    shards: str = Field(
        description="Folder of the prepared shards, or where they are read from: a URL (`s3://`, `gs://`, `hf://`, "
        "`https://` and what else fsspec knows), or `pipe:` and a command that writes the file `{}`."
    )
    weight: float = Field(
        1.0, ge=0, description="Share of training rows, relative to the other sources. 0: only in a later phase."
    )
    epochs: float | None = Field(
        None, ge=0, description="Instead of `weight`, in all sources: how often its rows are gone through, relative to "
        "the other sources. Exactly so often in a run of the length that they add up to. 0: only in a later phase."
    )  # fmt: skip
    tokens: float | None = Field(
        None, ge=0, description="Instead of `weight`, in all sources: how many tokens of it are trained on, padding "
        "included, relative to the other sources. 0: only in a later phase."
    )  # fmt: skip
    text_field: str = Field(
        "text", description="Field of a `.jsonl` line or of a `.json` in a `.tar`, or column of a table, that holds "
        "the text."
    )  # fmt: skip
    format: Literal["auto", "megatron", "nanogpt", "wikipedia", "squad", "imdb"] = Field(
        "auto", description="What the files are, where their names do not say it. `nanogpt`: bare token ids; "
        "`megatron`: those with an `.idx` beside them, which are recognised; both are ids of `tokenizer.model`. "
        "`wikipedia`, `squad`, `imdb`: these data sets as they are published, recognised by the names that they have "
        "then."
    )  # fmt: skip
    examples: ExamplesSection | None = Field(
        None, description="The source holds examples for tuning. Null: it holds documents."
    )
    filter: Bool = Field(True, description="Put `data.filters` to this source's documents.")
    val_fraction: float | None = Field(
        None, ge=0, le=1, description="Instead of `data.val_fraction`: share of the documents held out. 1: all "
        "of them, as of a published validation set; its share in training is 0 then."
    )  # fmt: skip
    augment: AugmentSection = Field(AugmentSection(), description="Noise in training, not in evaluation.")


class FiltersSection(Section):
    """What `prepare` leaves out or masks in text, all of it counted. Off by default; docs/data.md has the rules."""

    secrets: Literal["keep", "mask", "drop"] = Field(
        "keep", description="Private keys, and access keys and tokens of known services: mask them, or drop the "
        "documents that hold some."
    )  # fmt: skip
    personal_data: Literal["keep", "mask", "drop"] = Field(
        "keep", description="E-mail addresses, card numbers, public IPv4 addresses and phone numbers with a country "
        "code, likewise."
    )  # fmt: skip
    min_characters: CountOrZero = Field(0, description="Shortest document that is kept, in characters. 0: any.")
    max_characters: CountOrZero = Field(0, description="Longest document that is kept, in characters. 0: any.")
    min_alphanumeric: float = Field(
        0.0, ge=0, le=1, description="Least share of letters and digits among characters that are not white space."
    )
    repetition: Bool = Field(False, description="Drop documents of repeated lines, paragraphs or n-grams (Gopher's).")
    languages: list[str] = Field(
        [], description="Languages that are kept, by their codes of two letters; needs `longhaul[data]`. Empty: all."
    )
    near_duplicates: float = Field(
        0.0, ge=0, lt=1, description="Drop documents whose shingles of 5 words are as similar as this (Jaccard) to "
        "those of an earlier one, by MinHash; 0.8 is usual; needs `longhaul[data]`. 0: none."
    )  # fmt: skip


class PhaseSection(Section):
    """Part of a run from a step on. What it does not give is as in the part before it.

    It names its sources in `weights`, `epochs` or `tokens`, of which it gives one; sources that are not named are not
    in it. Each corpus goes on in its own order.
    """

    from_step: Count = Field(description="It begins after this many steps of the run.")
    weights: dict[str, Amount] = Field({}, description="Share of the rows of each source, relative to the others.")
    epochs: dict[str, Amount] = Field({}, description="How often the rows of each source are gone through, likewise.")
    tokens: dict[str, Amount] = Field({}, description="How many tokens of each source are trained on, likewise.")
    seq_len: int | None = Field(
        None, ge=8, description="Tokens in a row. `train.global_batch_size` and `train.micro_batch_size`, which are "
        "for rows of `data.seq_len`, are scaled so that a step has as many tokens as before. Null: as before."
    )  # fmt: skip


class DataSection(Section):
    """Corpora, their preparation and their order in training."""

    sources: list[SourceSection] = Field(min_length=1, description="The corpora that are mixed.")
    seq_len: int = Field(ge=8, description="Tokens in a row (T).")
    val_fraction: float = Field(0.001, ge=0, le=0.5, description="Share of documents held out, chosen by their hash.")
    drop_duplicates: Bool = Field(True, description="Drop documents that are byte for byte equal to an earlier one.")
    filters: FiltersSection = Field(FiltersSection(), description="What else is left out or masked in text.")
    on_bad_document: Literal["skip", "error"] = Field(
        "skip", description="What to do with a document that is not UTF-8, not JSON, lacks the text field or holds "
        "U+2581 where the tokenizer cannot restore it. Skipped ones are counted and reported."
    )  # fmt: skip
    on_bad_file: Literal["skip", "error"] = Field(
        "error", description="What to do with a source file that cannot be read to its end."
    )
    shard_bytes: int = Field(
        134_217_728, ge=4096, description="Size at which `prepare` begins a new shard; also the unit of packing."
    )
    prepare_processes: CountOrZero = Field(0, description="Processes that tokenize in `prepare`. 0: one per core.")
    packing: Literal["best_fit", "concat", "document"] = Field(
        "best_fit",
        description="How documents become rows: `best_fit` cuts none that fits a row, `concat` puts them back to back "
        "and cuts them where rows end, `document` gives each rows of its own. Documents never attend to each other.",
    )
    phases: list[PhaseSection] = Field(
        [], description="Later parts of the run, with other shares of the sources or rows of another length."
    )
    shuffle_window_shards: Count = Field(16, description="Shards whose rows are shuffled together.")
    prefetch_steps: Count = Field(2, description="Steps of rows that are read ahead of training.")
    max_damaged_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of a source's tokens that may turn out to be damaged or missing during a "
        "run: up to it they are masked in place, named and counted, beyond it the run ends."
    )  # fmt: skip
    cache_dir: str = Field(
        "", description="Folder on a disk of each node that keeps shards and checkpoints from elsewhere, for all "
        "its processes. Empty: `longhaul-cache-<user id>` in the folder for temporary files (`TMPDIR`)."
    )  # fmt: skip
    cache_bytes: Count = Field(
        100_000_000_000, description="Size of that folder at most; what was used longest ago makes room."
    )
    allow_pipe: Bool = Field(
        False,
        description="Run the shell commands of sources whose `shards` are `pipe:` and a command. Whoever writes the "
        "config then runs programs as you.",
    )
    retry_seconds: Count = Field(
        600,
        description="How long a file from elsewhere that cannot be read is tried again before the run fails. A "
        "checkpoint that cannot be written there fails after two minutes at most, and the run goes on.",
    )

    @property
    def seq_lens(self) -> list[int]:
        """Every length of rows in the run, the shortest first."""
        return sorted({self.seq_len, *(phase.seq_len for phase in self.phases if phase.seq_len is not None)})

    @property
    def max_seq_len(self) -> int:
        """The longest row of the run, which is what the model is made for."""
        return self.seq_lens[-1]


class OptimGroupSection(Section):
    """Parameters that learn at another rate or decay otherwise."""

    match: str = Field(
        min_length=1, description="Glob pattern of parameters' names, such as `embedding.*` or `blocks.0.*`."
    )
    lr_ratio: float = Field(1.0, ge=0, le=1000, description="Their rate relative to `optim.lr`; 0 freezes them.")
    weight_decay: float | None = Field(
        None, ge=0, le=10, description="Their decay, whatever they are. Null: as without this entry."
    )


class OptimSection(Section):
    """The optimizer. Weight decay applies to matrices only, never to norms, biases or learned positions."""

    name: Literal["adamw", "adam", "muon", "lion", "sgd", "rmsprop"] = Field("adamw", description="Optimizer.")
    lr: float = Field(gt=0, le=1, description="Peak learning rate.")
    betas: tuple[Probability, Probability] = Field(
        default_factory=lambda data: (0.9, 0.99) if data.get("name") == "lion" else (0.9, 0.95),
        json_schema_extra={"default": [0.9, 0.95]},
        description="Decay rates: of the first and second moment in AdamW, Adam and the AdamW part of Muon; of Lion's "
        "update and momentum, where the default is [0.9, 0.99].",
    )
    eps: float = Field(1e-8, gt=0, le=1e-2, description="Added to the root of the second moment.")
    alpha: Probability = Field(0.99, description="RMSprop's decay rate of the second moment.")
    momentum: Probability = Field(
        default_factory=lambda data: 0.95 if data.get("name") == "muon" else 0.0,
        json_schema_extra={"default": 0.0},
        description="Momentum of Muon, SGD and RMSprop. Muon's default is 0.95.",
    )
    nesterov: Bool = Field(
        default_factory=lambda data: data.get("name") == "muon",
        json_schema_extra={"default": False},
        description="Nesterov's form of momentum, in Muon and SGD. Muon's default is true.",
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        le=10,
        description="Decay of matrices: decoupled in AdamW, Muon and Lion, added to the gradient in Adam, SGD and "
        "RMSprop.",
    )
    clip_norm: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 does not clip.")
    groups: list[OptimGroupSection] = Field(
        [], description="Parameters with a rate or decay of their own; the first entry that matches a name counts."
    )


class ScheduleSection(Section):
    """Learning rate over the run: warm-up from 0, then the named shape."""

    name: Literal["cosine", "wsd", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: CountOrZero = Field(0, description="Steps over which the rate rises linearly to `optim.lr`.")
    decay_steps: CountOrZero = Field(
        0, description="Steps of `wsd`'s final linear decay. 0: a tenth of the run. Only for `wsd`."
    )
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="Rate at the end of the run, relative to `optim.lr`.")


class LoraSection(Section):
    """Low-rank adapters: the weights that a run begins with stay as they are; small matrices beside them are trained.

    `model.dropout` is the dropout that there is.
    """

    rank: Count = Field(8, description="Rows of the smaller matrix of each pair.")
    alpha: float = Field(16.0, gt=0, description="What an adapter adds is multiplied by alpha / rank.")
    targets: list[Literal["qkv", "attention_output", "ffn_up", "ffn_down"]] = Field(
        ["qkv", "attention_output", "ffn_up", "ffn_down"], min_length=1, description="Layers of each block that get "
        "some."
    )  # fmt: skip


class TrainSection(Section):
    """Length, batch and arithmetic of training."""

    num_steps: Count | None = Field(None, description="Optimizer updates. Give this or `num_tokens`.")
    num_tokens: Count | None = Field(None, description="Tokens to train on, rounded up to whole steps.")
    global_batch_size: Count = Field(description="Rows in a step, over all ranks and micro-steps.")
    micro_batch_size: Count = Field(description="Rows that one rank computes at once.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Arithmetic of the model; master weights and moments are fp32 always. fp16 needs a GPU."
    )
    grad_accum_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="In which gradients of micro-steps and ranks are summed, and sent. bf16, with precision bf16 only, "
        "halves their memory and what is sent, and rounds every sum.",
    )
    z_loss: float = Field(
        0.0, ge=0, le=1, description="Weight of log(sum(exp(logits)))^2 in the objective, which keeps logits from "
        "drifting; 1e-4 is usual. The `loss` that is reported never contains it."
    )  # fmt: skip
    label_smoothing: Probability = Field(
        0.0,
        description="Share of each target that is spread evenly over all tokens. The reported `loss` is without it.",
    )
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = Field(
        "none",
        description="`selective` keeps what matrix products and attention return, and computes norms, RoPE and "
        "activations again in the backward pass; `full` keeps each block's input only and computes all of it again; "
        "`offload` does so too and keeps these inputs in the host's memory, for which it needs a GPU.",
    )
    ffn_chunk_tokens: CountOrZero = Field(
        0,
        description="Tokens of a micro-batch whose feed-forward a rank computes at once, and once more in the backward "
        "pass, so that what is `model.ffn_dim` wide is held for so many only. 0: for all, once.",
    )
    deterministic: Bool = Field(
        False,
        description="On a GPU, have attention's backward pass too give the same bits on every run, for a second "
        "pass over the keys; all the rest does anyway, and so does a CPU.",
    )
    compile: Bool | None = Field(
        None,
        description="Compile the Transformer blocks by `torch.compile` in training, once for all of them, in the first "
        "step; the loss is the same but for rounding. Null: where it was measured to win, which so far is nowhere: "
        "`benchmarks/step.py` measures it (`ours-compiled`). Not with `parallel.zero_stage` 3.",
    )
    lora: LoraSection | None = Field(
        None, description="Train adapters only, beside the weights of `resume.from`. Null: all weights."
    )
    profile_steps: list[Count] = Field(
        [],
        description="Steps whose trace rank 0 writes into the run folder's `profile/`, for TensorBoard or Perfetto; on "
        "a GPU with a snapshot of its memory.",
    )

    @property
    def has_extra_terms(self) -> bool:
        """Whether the training objective is more than the cross-entropy."""
        return self.z_loss > 0 or self.label_smoothing > 0


class Config(Section):
    """One training run."""

    run: RunSection = Field(RunSection(), description="Where the run lives and what makes it reproducible.")
    model: ModelSection
    data: DataSection
    tokenizer: TokenizerSection
    optim: OptimSection
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resume: ResumeSection = ResumeSection()
    parallel: ParallelSection = ParallelSection()
    guard: GuardSection = GuardSection()
    log: LogSection = LogSection()
