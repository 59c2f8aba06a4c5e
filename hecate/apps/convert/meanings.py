"""What the keys of axolotl, LLaMA-Factory, TRL and transformers mean, by meaning and not by spelling: the one table.

The hints at unknown keys, the converter and docs/use/other_trainers.md come from it. Keys that all of them share with hecate
(learning_rate, max_steps, ...) stand in no table: they mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from hecate.apps.convert import datasets, method, values
from hecate.apps.convert.answer import Convert

SAME: dict[str, str] = {
    "model.name_or_path": "base_model model_name_or_path base_model_name_or_path model_path",
    "model.tensor_parallel": "tensor_parallel_size",
    "data.seq_len": "sequence_len cutoff_len max_length max_seq_length model_max_length",
    "data.packing": "packing sample_packing",
    "data.split_special_tokens": "split_special_tokens",
    "data.roles_to_train": "roles_to_train",
    "data.train_on_eos": "train_on_eos",
    "data.eval": "test_datasets validation_file",
    "micro_batch_size": "batch_size per_device_train_batch_size train_batch_size",
    "eval.batch_size": "per_device_eval_batch_size eval_batch_size",
    "eval.on_start": "eval_on_start",
    "learning_rate": "lr",
    "lr_scheduler_kwargs.min_lr_rate": "cosine_min_lr_ratio",
    "adam_beta1": "adam_beta_1",
    "adam_beta2": "adam_beta_2",
    "adam_epsilon": "adam_eps",
    "resume": "auto_resume_from_checkpoints",
    "nproc": "num_processes nproc_per_node num_gpus gpus",
    "ray.workers": "ray_num_workers",
    "lora.r": "lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.use_rslora": "use_rslora peft_use_rslora",
    "lora.init_from": "lora_model_dir adapter_name_or_path",
    "moe.num_experts": "num_experts",
    "moe.top_k": "top_k",
    "moe.router_aux_loss_coef": "router_aux_loss_coef router_loss_coef",
}
"""hecate's key, and what others call it"""
LEFT: dict[str, str] = {
    "tokenizer_name tokenizer_name_or_path tokenizer_type tokenizer_use_fast use_fast_tokenizer is_llama_derived_model model_type": "the "
    "model's folder says it; with model.front_end=megatron write model.tokenizer",
    "trust_remote_code": "models are transformers' own classes, and no code of a model's folder runs",
    "tf32": "float32 matmuls are computed in full precision",
    "lora_mlp_kernel lora_qkv_kernel lora_o_kernel fused_attn_kernel experts_implementation flash_attn_cross_entropy flash_attn_rms_norm "
    "flash_attn_fuse_mlp flash_attn_fuse_qkv use_unsloth enable_liger_kernel use_liger_kernel use_liger liger_kernel_config use_kt "
    "kt_optimize_rule cpu_infer chunk_size activation_offloading": "how it is computed; the key kernels chooses hecate's",
    "fsdp fsdp_config fsdp_version deepspeed accelerator_config": "experts are sharded always, "
    "and with moe.family=moe_lora all else by model.shard_non_experts=true",
    "expert_parallel_size": "fssdp.policy=static_ep is static expert parallelism, auto is what hecate is for",
    "ddp_find_unused_parameters ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers local_rank average_tokens_across_devices "
    "use_ray torch_empty_cache_steps": "ranks are started and joined by hecate; `hecate ray` is for a cluster of Ray",
    "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers "
    "dataset_processes": "rows are read from memory, and no worker is needed",
    "dataset_num_proc preprocessing_num_workers overwrite_cache dataset_prepared_path dataset_keep_in_memory tokenized_path": "data are tokenized once "
    "and kept in data.cache",
    "overwrite_output_dir": "a run never overwrites another: give a new output_dir, or resume=true",
    "logging_dir": "metrics.jsonl, and with report_to=[tensorboard] the folder tensorboard, are in output_dir",
    "run_name wandb_name wandb_run_id wandb_entity wandb_watch wandb_log_model wandb_mode hub_strategy hub_token hub_revision project "
    "trackio_space_id": "runs are named by output_dir; trackers read their own variables of the environment",
    "remove_unused_columns dataset_text_field dataset_kwargs": "the keys of records decide (docs/use/data.md)",
    "special_tokens": "the tokenizer's own are used; change them in the model's folder where they differ",
    "eos_token pad_token": "the tokenizer's own are used; change them in the model's folder where they differ",
    "pad_to_sequence_len padding_free pad_to_multiple_of eval_packing eval_sample_packing packing_strategy neat_packing "
    "sample_packing_eff_est group_by_length": "with data.packing nothing is padded and no sample attends to another; the loss is the same",
    "gradient_checkpointing_kwargs": "activations are recomputed in one way",
    "logging_first_step log_level plot_loss include_tokens_per_second include_num_input_tokens_seen disable_tqdm "
    "include_effective_tokens_per_second eval_table_size eval_table_max_new_tokens eval_max_new_tokens debug": "what is shown while it "
    "trains; `hecate report` draws it",
    "save_only_model save_safetensors save_on_each_node": "checkpoints hold the whole run, and output_dir/adapter the adapter",
    "loss_watchdog_threshold loss_watchdog_patience": "a loss that is not finite stops the run by max_skipped_steps",
    "do_train do_eval strict test_value env": "the verb says it: hecate train, hecate eval",
    "model_revision": "hub: true takes the newest; a folder of another revision can be named",
    "dataset_dir media_dir dataset_train_split dataset_test_split dataset_config shuffle_dataset dataset_splits "
    "dataset_configs": "read with the data's name",
    "world_size": "nproc is for this machine; `hecate launch` or torchrun for each node",
    "lora_task_type task_type": "hecate trains language models",
}
"""names that change nothing here, and why"""
DECIDED_HERE: dict[str, str] = {
    "train_on_prompt": "the loss is over answers of chats; data.roles_to_train names other roles",
    "mask_history": "the loss is over all answers of a chat",
    "greater_is_better": "losses are better when lower, and exact shares when higher",
    "val_split": "data.eval_share is the share of data.train that is held out",
    "assistant_only_loss completion_only_loss": "the loss is over answers always",
}
"""names of a setting that hecate decides for itself, and how"""
NOT_SUPPORTED: dict[str, str] = {
    "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage quantization_method quantize_moe_experts gptq": "quantised base "
    "weights",
    "use_dora peft_use_dora lora_use_dora": "DoRA",
    "loraplus_lr_ratio loraplus_lr_embedding": "other learning rates for A and B",
    "pissa_init pissa_iter pissa_convert": "PiSSA",
    "use_galore use_badam use_apollo use_adam_mini use_muon": "this optimizer by a key of its own; optim names those that there are",
    "use_llama_pro freeze_trainable_layers freeze_trainable_modules unfrozen_parameters mixture_of_depths": "training chosen layers",
    "neftune_noise_alpha noisy_embedding_alpha": "noise on embeddings",
    "push_to_hub hub_model_id hub_private_repo push_dataset_to_hub": "uploading",
    "rl pref_beta pref_loss pref_ftx beta dpo_beta kto_chosen_weight max_prompt_length reward_model": "training by preferences or rewards",
    "image_max_pixels video_max_pixels processor_type freeze_vision_tower freeze_multi_modal_projector": "images, video and sound",
    "label_smoothing_factor": "label smoothing",
    "use_dft_loss use_eaft_loss": "another loss; nll is hecate's",
    "context_parallel_size sequence_parallel_size": "context parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "torch_compile torch_compile_backend": "compiling the model",
    "lora_modules_to_save modules_to_save additional_target": "training modules beside the adapters; model.train_non_experts does it with "
    "moe.family=full",
    "curriculum_sampling sample_packing_sequentially train_sampling_strategy": "another order of samples than the seed's",
    "dataset_exact_deduplication": "removing what is twice",
    "rope_scaling rope_theta overrides_of_model_config shift_attn": "another position embedding than the model's",
    "callbacks": "code of yours from a configuration; docs/use/library.md has callbacks",
    "dataset_streaming streaming pretraining_dataset": "streaming from the hub",
    "mtp_enabled": "predicting several tokens",
}
"""names, and what they would do"""
CONVERTED: dict[str, tuple[str, Convert]] = {
    "datasets dataset dataset_name train_file train_data dataset_path dataset_mixer dataset_mixture": (
        "write data.train",
        datasets.data_of,
    ),
    "eval_dataset": ("write data.eval", datasets.data_of),
    "adapter": ("leave it out; moe.family says what is trained, and lora.init_from an adapter to go on from", method.method),
    "use_peft": ("leave it out; moe.family says what is trained", method.method),
    "finetuning_type": ("leave it out; moe.family says what is trained: mixlora, moe_lora or full", method.method),
    "stage": ("leave it out; hecate trains on answers (supervised fine-tuning) and on plain text", method.stage),
    "loss_type": ("leave it out; nll is hecate's loss", values.only_nll),
    "load_in_4bit load_in_8bit quantization_bit": ("not supported: quantised base weights; leave it out", method.quantised),
    "lora_target lora_target_modules target_modules lora_target_parameters": ("write lora.target_modules", method.targets),
    "lora_target_linear": (
        "leave it out: lora.target_modules names all of a decoder layer's linears unless it is given",
        method.all_linears,
    ),
    "attn_implementation flash_attn flash_attention attention sdp_attention flex_attention xformers_attention s2_attention "
    "eager_attention": ("write model.attention", values.attention),
    "torch_dtype dtype": ("write model.dtype", values.dtype),
    "bf16 bfloat16 precision mixed_precision": ("write model.dtype=bfloat16, or leave auto", values.dtype),
    "fp16 float16": (
        "float16 is not supported, whose small range needs a loss scale; write model.dtype=bfloat16, or float32 where there is none",
        values.dtype,
    ),
    "num_epochs epochs max_epochs": ("write num_train_epochs", values.length),
    "num_train_epochs": ("", values.length),
    "max_steps": ("", values.length),
    "warmup_steps": ("", values.warmup),
    "optim optimizer": ("write optim", values.optimizer),
    "lr_scheduler lr_scheduler_type": ("write lr_scheduler_type", values.learning_rate_curve),
    "lr_scheduler_kwargs": ("", values.schedule_kwargs),
    "max_grad_norm gradient_clipping": ("write max_grad_norm", values.max_norm),
    "gradient_checkpointing activation_checkpointing": ("write gradient_checkpointing", values.gradient_checkpointing),
    "disable_gradient_checkpointing": ("write gradient_checkpointing=false", values.gradient_checkpointing),
    "evaluation_strategy eval_strategy": ("write eval_steps=N, a number of steps between evaluations", values.strategy),
    "save_strategy": ("write save_steps=N, a number of steps between checkpoints", values.strategy),
    "logging_strategy": ("write logging_steps=N, a number of steps between records", values.strategy),
    "evals_per_epoch": ("write eval_steps=N, a number of steps between evaluations", values.per_epoch),
    "saves_per_epoch": ("write save_steps=N, a number of steps between checkpoints", values.per_epoch),
    "eval_steps": ("", values.steps_or_share),
    "save_steps": ("", values.steps_or_share),
    "logging_steps": ("", values.steps_or_share),
    "val_set_size val_size": ("write data.eval_share, the share of data.train that is held out", values.eval_share),
    "early_stopping_patience": ("", values.early_stop),
    "chat_template chat_template_path chat_template_jinja": (values.TEMPLATE, values.template),
    "template": ("leave it out: the tokenizer's own chat template is used; data.chat_template=FILE takes another", values.template),
    "train_on_inputs": ("leave it out; the loss is over answers of chats, and over all of plain text", values.train_on_inputs),
    "report_to": ("", values.trackers),
    "use_tensorboard": ("write report_to=[tensorboard]", values.tracker_named),
    "use_wandb": ("write report_to=[wandb]", values.tracker_named),
    "wandb_project": ("write report_to=[wandb]; the environment's WANDB_PROJECT names the project", values.tracker_named),
    "use_mlflow": ("write report_to=[mlflow]", values.tracker_named),
    "mlflow_tracking_uri": ("write report_to=[mlflow]; the environment's MLFLOW_TRACKING_URI says where", values.tracker_named),
    "max_samples": ("leave it out, and give data.train a file with that many records", datasets.max_samples),
    "plugins": ("leave it out; kernels chooses how experts are computed", values.plugins),
    "seed": ("", values.seed),
    "resume_from_checkpoint": ("write resume", values.resume),
    "model_config": ("leave it out; the model's own config.json is read", values.model_settings),
    "data_seed": ("write seed", values.seed),
}
"""names, the hint at them, and what makes hecate's keys of their values. Without a hint the name is hecate's, too"""
DEFAULTS: dict[str, dict[str, object]] = {
    "axolotl": {"adapter": None, "num_epochs": 1, "sample_packing": False, "lora_dropout": 0.0},
    "LLaMA-Factory": {
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "packing": False,
        "disable_gradient_checkpointing": False,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "save_steps": 500,
        "seed": 42,
    },
    "TRL": {
        "use_peft": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": None,
        "max_length": 1024,
        "packing": False,
        "gradient_checkpointing": True,
        "learning_rate": 2e-5,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "logging_steps": 10,
        "save_steps": 500,
        "seed": 42,
    },
}
"""trainer -> what it takes where a file does not say, of what hecate may take otherwise"""
LONG = {"LLaMA-Factory": "truncate", "TRL": "truncate"}
"""trainer -> data.on_bad_sample as it treats samples that are too long; the others leave them out, as hecate does"""


def _words(table: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((name, text) for names, text in table.items() for name in names.split())


KEYS: dict[str, str] = {name: key for key, names in SAME.items() for name in names.split()}
"""their name -> the key that is the same"""
REASONS: dict[str, str] = dict(_words(LEFT))
DECIDED: dict[str, str] = dict(_words(DECIDED_HERE))
UNSUPPORTED: dict[str, str] = dict(_words(NOT_SUPPORTED))
CONVERT: dict[str, Convert] = {name: convert for names, (_, convert) in CONVERTED.items() for name in names.split()}
HINTS: dict[str, str] = {
    **{name: f"write {key}" for name, key in KEYS.items()},
    **{name: f"leave it out; {reason}" for name, reason in (REASONS | DECIDED).items()},
    **{name: f"not supported: {what}; leave it out" for name, what in UNSUPPORTED.items()},
    **{name: hint for names, (hint, _) in CONVERTED.items() for name in names.split() if hint},
}
"""what to write in the place of each key of theirs that hecate does not have"""
