"""Which option was meant by a name that is none: typing errors, and what other trainers call it.

The table holds the spellings of Megatron-LM, GPT-NeoX, DeepSpeed, Hugging Face transformers, torchtitan, OLMo-core,
nanoGPT, nanochat and litgpt, in lower case with underscores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_SPELLINGS_OF = {
    "run.dir": "output_dir out_dir save save_dir dump_folder run_dir log_dir checkpoint_dir save_folder load"
    " load_path resume_from_checkpoint model_tag",
    "run.seed": "random_seed manual_seed rng_seed init_seed data_seed",
    "model.family": "model_type arch architecture model_name flavor model_flavor",
    "model.dim": "hidden_size n_embd d_model hidden_dim model_dim embed_dim embedding_dim emb_dim width"
    " encoder_hidden_size decoder_embed_dim model_size",
    "model.num_layers": "num_hidden_layers n_layer n_layers layers depth num_blocks decoder_layers num_decoder_layers"
    " encoder_num_layers",
    "model.num_heads": "num_attention_heads n_head n_heads heads attention_heads num_query_heads"
    " decoder_attention_heads",
    "model.num_kv_heads": "num_key_value_heads n_kv_heads kv_heads num_query_groups n_query_groups num_kv_head"
    " n_kv_head",
    "model.head_dim": "kv_channels head_size attention_head_dim d_head size_per_head key_dim",
    "model.ffn_dim": "intermediate_size ffn_hidden_size n_inner ffn_hidden_dim d_ff mlp_hidden_size feedforward_dim"
    " mlp_dim dim_feedforward hidden_mult multiple_of ffn_dim_multiplier hidden_dim",
    "model.norm": "normalization norm_type norm_class_name layer_norm_type",
    "model.norm_eps": "rms_norm_eps layer_norm_epsilon layernorm_epsilon layer_norm_eps rms_norm_epsilon norm_epsilon"
    " layernorm_eps",
    "model.activation": "hidden_act activation_function act_fn swiglu activation_type mlp_type",
    "model.positions": "pos_emb position_embedding_type pos_embedding position_encoding use_rotary_position_embeddings",
    "model.rope_theta": "rotary_emb_base rotary_base rope_base rope_freq_base",
    "model.rope_fraction": "partial_rotary_factor rotary_pct rotary_percent rotary_percentage rope_pct partial_rotary",
    "model.rope_scaling": "rope_parameters use_scaled_rope rope_scaling_type rotary_scaling",
    "model.rope_scaling.type": "rope_type",
    "model.rope_scaling.factor": "scaling_factor rope_scaling_factor rotary_scaling_factor scale_factor",
    "model.rope_scaling.original_seq_len": "original_max_position_embeddings original_max_seq_len old_context_len"
    " original_context_length",
    "model.rope_scaling.attention_factor": "attn_factor mscale",
    "model.qk_norm": "qk_layernorm qk_layer_norm use_qk_layernorm use_qk_norm norm_qk query_key_norm",
    "model.sliding_window": "window_size attention_window sliding_window_size local_attention_window"
    " use_sliding_window sliding_window_width",
    "model.attention_softcap": "attn_logit_softcapping attention_logit_softcapping attn_softcap attention_logit_cap",
    "model.logit_softcap": "final_logit_softcapping final_logit_softcap logits_soft_cap logit_soft_cap",
    "model.attention_bias": "add_qkv_bias qkv_bias use_bias_in_attn_linear attn_bias use_qkv_bias bias"
    " disable_bias_linear add_bias_linear",
    "model.ffn_bias": "mlp_bias use_bias_in_mlp use_mlp_bias",
    "model.tie_embeddings": "tie_word_embeddings weight_tying tie_weights no_weight_tying enable_weight_tying"
    " untie_embeddings_and_output_weights share_embeddings_and_output_weights",
    "model.dropout": "hidden_dropout resid_pdrop embd_pdrop resid_dropout dropout_rate hidden_dropout_prob",
    "model.attention_dropout": "attn_pdrop attn_dropout attention_dropout_prob attention_probs_dropout_prob",
    "model.init_std": "initializer_range init_method_std init_method",
    "tokenizer.model": "tokenizer_model tokenizer_path tokenizer_name tokenizer_dir vocab_file tokenizer_file"
    " tokenizer_name_or_path hf_assets_path",
    "tokenizer.kind": "tokenizer_type",
    "tokenizer.bos": "bos_token",
    "tokenizer.eos": "eos_token eod_token",
    "tokenizer.vocab_size": "vocab num_embeddings padded_vocab_size make_vocab_size_divisible_by n_vocab"
    " vocabulary_size",
    "data.sources": "data_path train_data_paths datasets dataset data_paths train_files data_impl blend data_mix mix",
    "data.packing": "pack_impl packing_strategy sequence_packing pack_sequences",
    "data.phases": "data_stages curriculum curriculum_learning training_stages data_phases",
    "data.phases.*.from_step": "start_training_step start_step begin_step",
    "data.sources.*.weight": "sampling_weight mix_weight train_data_weights proportion probability",
    "data.sources.*.paths": "path files input data_files",
    "data.sources.*.shards": "shard_dir shard_path url urls",
    "data.sources.*.text_field": "text_column text_key json_key json_keys jsonl_field",
    "data.seq_len": "seq_length sequence_length max_seq_len max_seq_length max_sequence_length block_size"
    " context_length max_position_embeddings n_positions n_ctx ctx_len max_length train_seq_len seqlen"
    " max_context_length",
    "data.val_fraction": "validation_split_percentage eval_split val_split split validation_fraction test_size",
    "data.drop_duplicates": "deduplicate dedup dedupe",
    "data.prepare_processes": "num_workers workers num_proc preprocessing_num_workers dataloader_num_workers",
    "data.prefetch_steps": "prefetch_factor prefetch dataloader_prefetch_factor",
    "optim.name": "optimizer_type optimizer_name optim_type type",
    "optim.lr": "learning_rate max_lr peak_lr max_learning_rate base_lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2 beta_1 beta_2",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.alpha": "rmsprop_alpha rho smoothing_constant",
    "optim.momentum": "momentum_beta muon_momentum sgd_momentum",
    "optim.nesterov": "muon_nesterov use_nesterov",
    "optim.weight_decay": "wd decay weight_decay_rate",
    "optim.groups": "param_groups parameter_groups param_group_args group_overrides",
    "optim.groups.*.match": "pattern regex param_name params parameters name_match",
    "optim.groups.*.lr_ratio": "lr_mult lr_scale lr_multiplier lr_factor decoupled_lr head_lr_mult"
    " embedding_lr unembedding_lr matrix_lr",
    "optim.clip_norm": "gradient_clipping clip_grad max_grad_norm grad_clip max_norm clip_grad_norm gradient_clip_val"
    " grad_clip_norm clip gradient_clip_norm",
    "schedule.name": "lr_decay_style lr_scheduler_type lr_scheduler decay_type lr_decay_type lr_schedule"
    " scheduler_type decay_lr type",
    "schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps"
    " lr_warmup_fraction lr_warmup_samples warmup_fraction warmup_num_steps warmup_tokens",
    "schedule.decay_steps": "lr_wsd_decay_iters decay_ratio lr_wsd_decay_samples cooldown_steps lr_decay_iters"
    " lr_decay_samples warmdown_steps num_decay_steps warmdown_iters warmdown_ratio decay decay_fraction",
    "schedule.final_lr_ratio": "min_lr min_lr_ratio min_lr_factor min_lr_rate lr_min_ratio min_learning_rate"
    " final_lr_frac alpha_f",
    "train.num_steps": "max_steps train_iters total_steps steps max_iters num_iterations training_steps iterations"
    " num_iters train_steps max_train_steps num_train_steps max_step total_num_steps max_duration",
    "train.num_tokens": "max_tokens train_tokens total_tokens train_samples training_tokens num_train_epochs epochs"
    " train_epochs max_duration",
    "train.global_batch_size": "train_batch_size batch_size total_batch_size gradient_accumulation_steps"
    " per_device_batch_size gradient_accumulation_iters accumulate_grad_batches gas num_tokens_per_train_step",
    "train.micro_batch_size": "train_micro_batch_size_per_gpu per_device_train_batch_size device_batch_size"
    " local_batch_size micro_batch per_gpu_batch_size device_train_microbatch_size batch_size"
    " num_tokens_per_microbatch_per_dp_rank",
    "train.precision": "dtype torch_dtype bf16 fp16 mixed_precision params_dtype mixed_precision_param"
    " precision_type amp autocast_precision",
    "train.z_loss": "z_loss_weight z_loss_multiplier z_loss_coeff zloss lse_square_scale auxiliary_loss_multiplier",
    "train.label_smoothing": "label_smoothing_factor smoothing label_smooth",
    "train.activation_checkpointing": "gradient_checkpointing checkpoint_activations recompute_granularity"
    " recompute_activations activation_checkpoint use_checkpointing recompute ac_config cpu_checkpointing"
    " activation_offloading offload_activations activation_offload cpu_offloading enable_activation_offload"
    " activation_checkpoint_cpu_offload fine_grained_activation_offloading",
    "train.ffn_chunk_tokens": "tiled_mlp tiled_mlp_compute tiled_mlp_num_shards mlp_chunk_size chunk_size_feed_forward"
    " chunked_mlp ffn_chunk_size mlp_chunk_tokens",
    "train.deterministic": "deterministic_mode cudnn_deterministic full_determinism",
    "train.compile": "torch_compile compile_model use_compile",
    "parallel.zero_stage": "zero_optimization zero stage zero_optimization_stage data_parallel_shard_degree"
    " use_distributed_optimizer dp_config",
    "parallel.offload": "offload_optimizer offload_param cpu_offload optimizer_cpu_offload enable_cpu_offload"
    " offload_params fsdp_cpu_offload",
    "parallel.nvme_dir": "nvme_path offload_folder",
    "parallel.hpz_ranks": "zero_hpz_partition_size",
    "parallel.quantize": "zero_quantized_weights zero_quantized_gradients",
    "guard.check_replicas_every": "check_weight_hash_across_dp_replicas_interval",
    "parallel.sequence_parallel_size": "context_parallel_size context_parallel_degree cp_size sp_size sp_degree"
    " ulysses_sequence_parallel_size ulysses_degree sequence_parallel_degree ds_sequence_parallel_size"
    " ulysses context_parallel sequence_parallelism cp_config context_parallelism",
    "parallel.overlap_comm": "overlap_grad_reduce",
    "parallel.timeout_seconds": "distributed_timeout_minutes ddp_timeout train_timeout_seconds dist_timeout",
    "parallel.start_timeout_seconds": "init_timeout_seconds",
    "eval.every_steps": "eval_interval eval_steps val_check_interval eval_every evaluation_interval eval_freq"
    " evaluation_strategy freq eval_strategy",
    "eval.max_rows": "eval_iters eval_batches max_eval_samples limit_val_batches max_eval_rows validation_steps"
    " eval_tokens",
    "eval.tasks": "eval_tasks downstream_evaluators core_metric_every",
    "eval.patience": "early_stopping_patience early_stopping early_stopper",
    "eval.min_delta": "early_stopping_threshold threshold",
    "eval.sample_every_steps": "sample_every sample_interval generate_every sample_freq inference_interval",
    "eval.sample_tokens": "sample_length num_generated_tokens",
    "checkpoint.every_steps": "save_interval save_steps checkpoint_interval save_every checkpoint_freq"
    " checkpoint_every checkpoint_factor ckpt_interval interval",
    "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints keep_latest_k max_checkpoints keep"
    " num_checkpoints_to_keep",
    "checkpoint.keep_best": "load_best_model_at_end save_best always_save_checkpoint",
    "resume.from": "init_from resume_from resume_from_checkpoint initial_load_path load_path pretrained_checkpoint",
    "resume.optimizer": "no_load_optim load_optimizer reset_optimizer_state load_optim_state",
    "resume.schedule": "no_load_scheduler load_scheduler override_opt_param_scheduler load_trainer_state",
    "log.every_steps": "log_interval logging_steps log_freq steps_per_print log_every log_every_n_steps",
    "log.tensorboard": "tensorboard_dir enable_tensorboard report_to tensorboard_writer use_tensorboard",
    "log.wandb": "wandb_project wandb_log use_wandb enable_wandb wandb_name wandb_project_name",
    "optim": "optimizer optimiser optimizers optimization",
    "schedule": "scheduler",
    "train": "training trainer training_arguments",
    "parallel": "parallelism distributed deepspeed zero_config",
    "eval": "evaluation validation validate",
    "checkpoint": "checkpoints checkpointing ckpt",
    "log": "logging logger metrics",
    "model": "network transformer",
    "guard": "fault_tolerance resilience",
}

# The options that a word stands for: `batch_size` is one thing in nanoGPT and another in OLMo-core.
SPELLINGS: dict[str, list[str]] = {}
for _option, _words in _SPELLINGS_OF.items():
    for _word in _words.split():
        SPELLINGS.setdefault(_word, []).append(_option)

# Other ways to divide a model. Looked for first: their names are spelt like that of sequence parallelism.
_NOT_HERE = re.compile(r"(tensor|pipe(line)?|expert)_(model_)?parallel.*|(tp|pp|ep|autotp)_(size|degree)")


def suggest_option(name: str, known: Sequence[str]) -> str:
    """Say which option was probably meant by `name`, or which ones its section has.

    Looked up in this order: the table of other trainers' spellings; in the same section, names that begin alike, or
    look alike (difflib at 0.7: its usual 0.6 suggests nonsense); elsewhere, options whose last segment is the same or
    looks alike (at 0.8); and else what the section has.

    Args:
        name: dotted name that is no option; an item of a list is `*`.
        known: dotted names of all options and sections.

    Returns:
        `Did you mean model.dim?` or `model has dim, …, num_layers.`
    """
    section, _, word = name.rpartition(".")
    word = word.lower().replace("-", "_")
    if _NOT_HERE.fullmatch(word):
        return (
            "Tensor, pipeline and expert parallelism are not part of Longhaul; parallel.zero_stage divides the states, "
            "parallel.sequence_parallel_size the rows."
        )
    inside = [option for option in known if option.rpartition(".")[0] == section]
    for close in (
        [option for option in SPELLINGS.get(word, []) if option in known],
        _begins(word, inside) if section else [],
        _alike(word, inside, 0.7) if section else [],
        _same(word, known),
        _alike(word, known),
    ):
        if close:
            return f"Did you mean {_either(close)}?"
    names = ", ".join(sorted(option.rpartition(".")[2] for option in inside))
    return f"{section.removesuffix('.*') or 'A config'} has {names}."


def options_meant(word: str) -> list[str]:
    """Return the options that are called so, in Longhaul or by another trainer: `num_steps`, `--train.num-steps`."""
    from pretrain.options.config_docs import options  # takes a while, and only a wrong command asks

    known = list(options())
    word = word.lower().replace("-", "_")
    if word in known:
        return [word]
    found = SPELLINGS.get(word.rpartition(".")[2], []) or _same(word, known)
    return [option for option in found if option in known and "*" not in option and not options()[option].section]


def _same(word: str, known: Sequence[str]) -> list[str]:
    """Return the options whose last segment is `word`; one of a list only if its section does not have it itself."""
    found = [option for option in known if option.rpartition(".")[2] == word]
    return [option for option in found if "*" not in option or f"{option.partition('.')[0]}.{word}" not in found]


def _begins(word: str, known: Sequence[str]) -> list[str]:
    """Return the options whose last segment begins with `word`, or `word` with that and more words."""
    names = {option: option.rpartition(".")[2] for option in known}
    return [
        option for option, name in names.items()
        if (len(word) > 3 and name.startswith(word)) or word.startswith(f"{name}_")
    ]  # fmt: skip


def _alike(word: str, known: Sequence[str], cutoff: float = 0.8) -> list[str]:
    """Return the options whose last segment is spelled like `word`, the likeliest word's only."""
    words = difflib.get_close_matches(word, {option.rpartition(".")[2] for option in known}, n=1, cutoff=cutoff)
    return [option for option in known if option.rpartition(".")[2] in words]


def _either(names: Sequence[str]) -> str:
    """Join names with commas and `or`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]
