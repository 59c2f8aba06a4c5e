"""What the keys of axolotl, LLaMA-Factory, TRL and transformers mean, by meaning and not by spelling: the one table.

The hints at unknown keys, the converter and docs/use/other_trainers.md come from it. Keys that all of them share with hecate
(learning_rate, save_steps, ...) stand here only where their values differ.
"""

from __future__ import annotations

import yaml

from hecate.apps.convert import datasets, values

SAME: dict[str, str] = {
    "model.name_or_path": "base_model model_name_or_path base_model_name_or_path model_path",
    "model.tensor_parallel": "tensor_parallel_size",
    "data.seq_len": "sequence_len cutoff_len max_length max_seq_length model_max_length",
    "data.packing": "packing sample_packing",
    "data.split_special_tokens": "split_special_tokens",
    "data.roles_to_train": "roles_to_train",
    "data.train_on_eos": "train_on_eos",
    "micro_batch_size": "batch_size per_device_train_batch_size train_batch_size",
    "eval.on_start": "eval_on_start",
    "learning_rate": "lr",
    "lr_scheduler_kwargs.min_lr_rate": "cosine_min_lr_ratio",
    "adam_beta1": "adam_beta_1",
    "adam_beta2": "adam_beta_2",
    "adam_epsilon": "adam_eps",
    "resume": "auto_resume_from_checkpoints resume_from_checkpoint",
    "nproc": "num_processes nproc_per_node num_gpus gpus",
    "ray.workers": "ray_num_workers",
    "lora.r": "lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.use_rslora": "use_rslora peft_use_rslora",
    "lora.moe_rank_scaling": "moe_rank_scaling normalize_moe_lora",
    "lora.init_from": "lora_model_dir adapter_name_or_path",
    "moe.num_experts": "num_experts",
    "moe.top_k": "top_k num_experts_per_tok",
    "moe.router_aux_loss_coef": "router_aux_loss_coef router_loss_coef",
}
"""hecate's key, and what others call it"""
LEFT: dict[str, str] = {
    "tokenizer_type use_fast_tokenizer is_llama_derived_model model_type": "the model's folder says it",
    "special_tokens eos_token pad_token": "the tokenizer's own are used; change them in the model's folder where they differ",
    "trust_remote_code code_revision": "models are transformers' own classes, and no code of a model's folder runs",
    "tf32": "float32 matmuls are computed in full precision",
    "lora_mlp_kernel lora_qkv_kernel lora_o_kernel fused_attn_kernel experts_implementation flash_attn_cross_entropy flash_attn_rms_norm "
    "use_unsloth enable_liger_kernel use_liger_kernel use_liger use_kt kt_optimize_rule cpu_infer chunk_size activation_offloading "
    "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_swiglu liger_cross_entropy liger_fused_linear_cross_entropy "
    "cut_cross_entropy": "how it is computed changes nothing; kernels chooses hecate's way",
    "gradient_checkpointing_kwargs": "how activations are computed again changes nothing",
    "fsdp fsdp_config fsdp_version deepspeed": "experts are sharded always, and with moe.family=moe_lora all else by "
    "model.shard_non_experts=true; for plain LoRA each rank holds the base",
    "expert_parallel_size": "fssdp.policy=static_ep is static expert parallelism, auto is what hecate is for",
    "ddp_find_unused_parameters ddp_timeout ddp_backend local_rank use_ray": "hecate starts the ranks; `hecate ray` does it on Ray",
    "world_size": "nproc is for this machine; `hecate launch` or torchrun for each node",
    "dataloader_num_workers dataloader_pin_memory dataset_processes": "rows are read from memory, and no worker is needed",
    "dataset_num_proc preprocessing_num_workers preprocessing_batch_size data_shared_file_system "
    "overwrite_cache dataset_prepared_path tokenized_path": "data are tokenized once and kept in data.cache",
    "dataset_dir dataset_train_split dataset_test_split dataset_config dataset_splits remove_unused_columns "
    "dataset_text_field": "it is read with the data's name, or the keys of records say it",
    "pad_to_sequence_len padding_free pad_to_multiple_of eval_packing eval_sample_packing packing_strategy "
    "neat_packing": "no sample attends to another, and padding is not trained on: the loss is the same",
    "per_device_eval_batch_size eval_batch_size": "the held-out loss takes micro_batch_size, and eval.batch_size is of generated answers",
    "overwrite_output_dir": "a run never overwrites another: give a new output_dir, or resume=true",
    "logging_dir": "metrics.jsonl, and with report_to=[tensorboard] the folder tensorboard, are in output_dir",
    "adapter_name": "a run has one adapter, output_dir/adapter",
    "run_name wandb_name wandb_run_id wandb_entity wandb_watch wandb_log_model hub_strategy": "output_dir names the run, and trackers read "
    "the environment",
    "log_level plot_loss logging_first_step disable_tqdm eval_table_size eval_table_max_new_tokens eval_max_new_tokens debug": "it changes "
    "what is shown; `hecate report` draws the run",
    "media_dir buffer_size eval_num_beams ignore_pad_token_for_loss": "it is of images, of streaming or of generation, or is always so",
    "eval_on_each_dataset": "each source is evaluated by itself, always",
    "save_only_model save_safetensors": "checkpoints hold the whole run, and output_dir/adapter the adapter",
    "loss_watchdog_threshold loss_watchdog_patience": "no key stops a run at a finite loss, so watch it: max_skipped_steps is "
    "for losses that are not finite",
    "do_train do_eval": "the verb says it: hecate train, hecate eval",
    "strict": "a key that hecate does not know is refused, always",
    "completion_only_loss": "the loss is over answers, and over all of plain text",
    "greater_is_better": "losses are better when lower, and exact shares when higher",
}
"""names that change nothing here, and why"""
NOT_SUPPORTED: dict[str, str] = {
    "bnb_4bit_quant_type use_bnb_nested_quant quantization_method": "quantised base weights",
    "use_dora peft_use_dora": "DoRA",
    "loraplus_lr_ratio": "other learning rates for A and B",
    "pissa_init pissa_iter pissa_convert": "PiSSA",
    "use_galore use_badam use_apollo use_adam_mini use_muon": "an optimizer by a key of its own; optim names those that there are",
    "use_llama_pro freeze_trainable_layers freeze_trainable_modules unfrozen_parameters": "training chosen layers",
    "neftune neftune_noise_alpha": "noise on embeddings",
    "lora_bias": "training biases beside the adapters",
    "push_to_hub hub_model_id push_dataset_to_hub": "uploading",
    "rl pref_beta pref_loss beta max_prompt_length": "training by preferences or rewards",
    "image_max_pixels video_max_pixels processor_type skip_prepare_dataset": "images, video and sound",
    "label_smoothing_factor": "label smoothing",
    "group_by_length": "sorting by length; data.packing wastes no tokens either",
    "tokenizer_name tokenizer_name_or_path": "another tokenizer than the model's; with model.front_end=megatron write model.tokenizer",
    "context_parallel_size sequence_parallel_size": "context parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "torch_compile": "compiling the model",
    "lora_modules_to_save modules_to_save additional_target": "training modules beside the adapters; model.train_non_experts does it with "
    "moe.family=full",
    "lora_fan_in_fan_out": "transposed weights",
    "interleave_probs": "a mixture by probabilities; the items' weight in data.train says it",
    "default_system": "a system message that the chat template does not write; put it into the records",
    "tool_format": "another form of tools than the chat template's",
    "curriculum_sampling sample_packing_sequentially": "another order of samples than the seed's",
    "dataset_exact_deduplication": "removing samples that are there twice",
    "rope_scaling shift_attn": "another position embedding or attention than the model's",
    "callbacks": "code that a file names; docs/use/library.md has callbacks",
    "streaming dataset_streaming pretraining_dataset": "streaming from the hub",
    "train_on_prompt mask_history": "a loss over other roles; data.roles_to_train names them where it is a key",
}
"""names, and what they would do"""
CONVERTED: dict[str, tuple[values.Convert, str]] = {
    "datasets dataset dataset_name train_file train_data dataset_path dataset_mixer dataset_mixture": (
        datasets.data_of,
        "write data.train",
    ),
    "eval_dataset test_datasets validation_file": (datasets.data_of, "write data.eval"),
    "max_samples": (datasets.max_samples, "leave it out, and give files with that many records"),
    "adapter use_peft finetuning_type": (values.method, "leave it out; moe.family says what is trained: mixlora, moe_lora or full"),
    "stage": (values.method, "leave it out; hecate trains on answers (supervised fine-tuning) and on plain text"),
    "load_in_4bit load_in_8bit quantization_bit": (values.method, "not supported: quantised base weights; leave it out"),
    "lora_target lora_target_modules target_modules lora_target_parameters": (values.targets, "write lora.target_modules"),
    "lora_target_linear": (values.targets, "leave it out; lora.target_modules has all linears of a decoder layer unless it is given"),
    "num_epochs epochs max_epochs": (values.steps, "write num_train_epochs"),
    "num_train_epochs max_steps warmup_steps eval_steps save_steps logging_steps": (values.steps, ""),
    "evaluation_strategy eval_strategy evals_per_epoch": (values.steps, "write eval_steps=N, a number of steps between evaluations"),
    "save_strategy saves_per_epoch": (values.steps, "write save_steps=N, a number of steps between checkpoints"),
    "logging_strategy": (values.steps, "write logging_steps=N, a number of steps between records"),
    "optim optimizer": (values.training, "write optim"),
    "shuffle_merged_datasets": (values.training, "leave it out; samples are shuffled, by the seed"),
    "mix_strategy": (values.training, "leave it out; the items of data.train are mixed by their weights"),
    "enable_thinking": (values.training, "leave it out; the chat template writes thoughts or none"),
    "lr_scheduler": (values.training, "write lr_scheduler_type"),
    "lr_scheduler_type lr_scheduler_kwargs max_grad_norm gradient_checkpointing seed": (values.training, ""),
    "gradient_clipping": (values.training, "write max_grad_norm"),
    "activation_checkpointing": (values.training, "write gradient_checkpointing"),
    "disable_gradient_checkpointing": (values.training, "write gradient_checkpointing=false"),
    "data_seed": (values.training, "write seed"),
    "val_set_size val_size": (values.training, "write data.eval_share, the share of data.train that is held out"),
    "train_on_inputs": (values.training, "leave it out; the loss is over answers of chats, and over all of plain text"),
    "assistant_only_loss": (values.training, "leave it out; the loss is over answers of chats, and over all of plain text"),
    "loss_type": (values.training, "leave it out; nll is hecate's loss"),
    "chat_template chat_template_path": (
        values.surroundings,
        "write data.chat_template=FILE, a Jinja file, or leave it out: the tokenizer's own is used",
    ),
    "chat_template_jinja": (values.surroundings, "write data.chat_template=FILE, a file with this text"),
    "template": (values.surroundings, "leave it out: the tokenizer's own chat template is used; data.chat_template=FILE takes another"),
    "attn_implementation flash_attn flash_attention attention sdp_attention flex_attention xformers_attention s2_attention "
    "eager_attention": (values.surroundings, "write model.attention"),
    "torch_dtype dtype": (values.surroundings, "write model.dtype"),
    "bf16 bfloat16 precision mixed_precision": (values.surroundings, "write model.dtype=bfloat16, or leave auto"),
    "fp16": (
        values.surroundings,
        "float16 is not supported, whose small range needs a loss scale; write model.dtype=bfloat16, or float32 where there is none",
    ),
    "model_revision": (values.surroundings, "write the folder of that revision in model.name_or_path"),
    "report_to": (values.surroundings, ""),
    "use_tensorboard": (values.surroundings, "write report_to=[tensorboard]"),
    "use_wandb": (values.surroundings, "write report_to=[wandb]"),
    "wandb_project": (values.surroundings, "write report_to=[wandb]; the environment's WANDB_PROJECT names the project"),
    "use_mlflow": (values.surroundings, "write report_to=[mlflow]"),
    "mlflow_tracking_uri": (values.surroundings, "write report_to=[mlflow]; the environment's MLFLOW_TRACKING_URI says where"),
    "plugins": (values.surroundings, "leave it out; kernels chooses how experts are computed"),
    "model_config": (values.surroundings, "leave it out; the model's own config.json is read"),
}
"""names, what makes hecate's keys of their values, and the hint at them; without a hint the name is hecate's, too"""
DEFAULTS: dict[str, str] = {
    "axolotl": "{adapter: null, num_epochs: 1, sample_packing: false, lora_dropout: 0.0, warmup_ratio: 0.03}",
    "LLaMA-Factory": "{finetuning_type: lora, lora_rank: 8, lora_dropout: 0.0, lora_target: all, cutoff_len: 2048, packing: false, "
    "disable_gradient_checkpointing: false, learning_rate: 5.0e-5, num_train_epochs: 3.0, per_device_train_batch_size: 8, "
    "lr_scheduler_type: linear, save_steps: 500, seed: 42}",
    "TRL": "{use_peft: false, assistant_only_loss: false, lora_r: 16, lora_alpha: 32, lora_dropout: 0.05, lora_target_modules: null, "
    "max_length: 1024, packing: false, gradient_checkpointing: true, learning_rate: 2.0e-5, num_train_epochs: 3.0, "
    "per_device_train_batch_size: 8, lr_scheduler_type: linear, logging_steps: 10, save_steps: 500, seed: 42}",
}
"""trainer -> what it takes where a file does not say, of what hecate may take otherwise"""
IN_PLACE = {
    "max_length": "max_seq_length",
    "lora_target_modules": "lora_target_parameters",
    "disable_gradient_checkpointing": "gradient_checkpointing",
    "num_epochs": "max_steps",
    "num_train_epochs": "max_steps",
    "warmup_ratio": "warmup_steps",
}
"""a default -> the key that stands in its place"""


def defaults(trainer: str) -> dict[str, object]:
    """What a trainer takes where a file does not say."""
    found: dict[str, object] = yaml.safe_load(DEFAULTS[trainer])
    return found


HINTS: dict[str, str] = {
    **{name: f"write {key}" for key, names in SAME.items() for name in names.split()},
    **{name: f"leave it out; {reason}" for names, reason in LEFT.items() for name in names.split()},
    **{name: f"not supported: {what}; leave it out" for names, what in NOT_SUPPORTED.items() for name in names.split()},
    **{name: hint for names, (_, hint) in CONVERTED.items() for name in names.split() if hint},
}
"""what to write in the place of each key of theirs that hecate does not have"""
VALUE_HINTS: dict[str, dict[str, str]] = {
    "optim": {
        name: f"write {kind}{values.OTHERWISE.get(name, '')}"
        for kind, names in values.OPTIMIZERS.items()
        for name in names.split()
        if name != kind
    }
}
"""hecate's key, a value that others have for it -> what to write in its place"""
