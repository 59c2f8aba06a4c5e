"""What the keys of axolotl, LLaMA-Factory, TRL and transformers are called in hecate's configurations.

People bring these keys from files of theirs. Each is answered with the key that does the same, or with the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator

from hecate.config.sections import APPS

KEYS: dict[str, str] = {
    "model.name_or_path": "base_model base_model_name_or_path model_name_or_path model_path",
    "model.attention": "attn_implementation flash_attn flash_attention sdp_attention flex_attention",
    "model.dtype": "torch_dtype",
    "model.tensor_parallel": "tensor_parallel_size",
    "data.train": "datasets dataset dataset_name train_file train_data dataset_path path",
    "data.eval": "test_datasets eval_dataset validation_file",
    "data.seq_len": "sequence_len cutoff_len max_length max_seq_length model_max_length",
    "data.packing": "packing sample_packing",
    "data.cache": "dataset_prepared_path",
    "num_train_epochs": "epochs num_epochs max_epochs",
    "micro_batch_size": "batch_size per_device_train_batch_size train_batch_size",
    "eval.batch_size": "per_device_eval_batch_size eval_batch_size",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "adam_beta1": "adam_beta_1",
    "adam_beta2": "adam_beta_2",
    "adam_epsilon": "adam_eps",
    "max_grad_norm": "gradient_clipping",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "gradient_checkpointing": "activation_checkpointing",
    "nproc": "num_processes nproc_per_node num_gpus gpus",
    "seed": "data_seed",
    "lora.r": "lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules target_modules",
    "lora.use_rslora": "use_rslora peft_use_rslora",
    "lora.moe_rank_scaling": "moe_rank_scaling normalize_moe_lora",
    "lora.init_from": "lora_model_dir adapter_name_or_path",
    "moe.num_experts": "num_experts",
    "moe.top_k": "top_k",
    "moe.router_aux_loss_coef": "router_aux_loss_coef router_loss_coef",
    "data.chat_template": "chat_template_path",
    "data.split_special_tokens": "split_special_tokens",
}
"""hecate's key, and what others call it"""
_WRITE: dict[str, str] = {
    "tokenizer_name tokenizer_name_or_path": "leave it out: the tokenizer is in the model's folder; "
    "with model.front_end=megatron write model.tokenizer",
    "bf16 precision mixed_precision": "write model.dtype=bfloat16, or leave auto",
    "fp16": "float16 is not supported, whose small range needs a loss scale; write model.dtype=bfloat16, or float32 where there is none",
    "tf32": "leave it out: float32 matmuls are computed in full precision",
    "warmup_steps": "write warmup_ratio: warmup steps divided by max_steps",
    "evaluation_strategy eval_strategy": "write eval_steps=N, a number of steps between evaluations",
    "save_strategy": "write save_steps=N, a number of steps between checkpoints",
    "val_set_size": "give held-out files in data.eval; no part of data.train is held out",
    "load_best_model_at_end": "keep checkpoints with save_total_limit, and choose by the losses in metrics.jsonl",
    "finetuning_type": "leave it out; moe.family says what is trained: mixlora, moe_lora or full",
    "stage": "leave it out; hecate trains on answers (supervised fine-tuning) and on plain text",
    "optim optimizer": "leave it out; the optimizer is AdamW",
    "fsdp fsdp_config deepspeed": "leave it out; experts are sharded always, "
    "and with moe.family=moe_lora all else by model.shard_non_experts=true",
    "expert_parallel_size": "leave it out; fssdp.policy=static_ep is static expert parallelism, auto is what hecate is for",
    "ddp_find_unused_parameters": "leave it out; experts that no token has reached are known",
    "dataloader_num_workers": "leave it out; rows are read from memory, and no worker is needed",
    "dataset_num_proc preprocessing_num_workers": "leave it out; data are tokenized once and kept in data.cache",
    "overwrite_output_dir": "give a new output_dir, or resume=true; a run never overwrites another",
    "chat_template": "write data.chat_template=FILE, a Jinja file, or leave it out: the tokenizer's own is used",
    "chat_template_jinja": "write data.chat_template=FILE, a file with this text",
    "template": "leave it out: the tokenizer's own chat template is used; data.chat_template=FILE takes another",
    "train_on_inputs": "leave it out; the loss is over answers of chats, and over all of plain text",
    "logging_dir": "leave it out; metrics.jsonl, and with report_to=[tensorboard] the folder tensorboard, are in output_dir",
    "use_tensorboard": "write report_to=[tensorboard]",
    "use_wandb": "write report_to=[wandb]",
    "wandb_project": "write report_to=[wandb]; the environment's WANDB_PROJECT names the project",
    "use_mlflow": "write report_to=[mlflow]",
    "mlflow_tracking_uri": "write report_to=[mlflow]; the environment's MLFLOW_TRACKING_URI says where",
    "remove_unused_columns": "leave it out",
    "special_tokens": "leave it out; the tokenizer's own are used",
    "world_size": "write nproc for this machine, or start `hecate launch` or torchrun on each node",
}
"""names, and what to write in their place"""
_NOT_SUPPORTED: dict[str, str] = {
    "load_in_4bit load_in_8bit quantization_bit": "quantised base weights",
    "use_dora peft_use_dora": "DoRA",
    "neftune_noise_alpha": "noise on embeddings",
    "push_to_hub hub_model_id": "uploading",
    "rl pref_beta": "training by preferences or rewards",
    "label_smoothing_factor": "label smoothing",
    "group_by_length": "sorting by length; data.packing wastes no tokens either",
    "context_parallel_size": "context parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "torch_compile": "compiling the model",
    "lora_modules_to_save modules_to_save": "training modules beside the adapters; model.train_non_experts does it with moe.family=full",
}
"""names, and what they would do"""
_HINTS: dict[str, str] = {
    **{name: f"write {key}" for key, names in KEYS.items() for name in names.split()},
    **{name: hint for names, hint in _WRITE.items() for name in names.split()},
    **{name: f"not supported: {what}; leave it out" for names, what in _NOT_SUPPORTED.items() for name in names.split()},
}


def key_hint(key: str) -> str:
    """What to write in the place of another trainer's key, a hint for the message that refuses it. "" if the key is not known.

    Args:
        key: as it was given, such as lora_r or training.bf16; only its last part counts.
    """
    if key.partition(".")[0] in APPS:  # no other trainer has these, and the same words mean other keys of the run
        return ""
    return _HINTS.get(key.rpartition(".")[2].replace("-", "_").lower(), "")


def known_names() -> Iterator[tuple[str, str]]:
    """Every name of another trainer that is answered, and its answer."""
    yield from sorted(_HINTS.items())
