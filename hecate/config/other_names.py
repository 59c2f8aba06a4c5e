"""What the keys of axolotl, LLaMA-Factory, TRL and transformers are called in hecate's configurations.

People bring these keys from files of theirs. Each is answered with the key that does the same, or with the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator

from hecate.config.sections import APPS

_SAME: dict[str, str] = {
    # model
    "base_model": "model.name_or_path",
    "base_model_name_or_path": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_path": "model.name_or_path",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention",
    "flash_attention": "model.attention",
    "sdp_attention": "model.attention",
    "flex_attention": "model.attention",
    "torch_dtype": "model.dtype",
    "tensor_parallel_size": "model.tensor_parallel",
    # data
    "datasets": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "dataset_path": "data.train",
    "path": "data.train",
    "test_datasets": "data.eval",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "sequence_len": "data.seq_len",
    "cutoff_len": "data.seq_len",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "model_max_length": "data.seq_len",
    "packing": "data.packing",
    "dataset_prepared_path": "data.cache",
    "sample_packing": "data.packing",
    # training
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "eval_batch_size": "eval.batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "adam_beta_1": "adam_beta1",
    "adam_beta_2": "adam_beta2",
    "adam_eps": "adam_epsilon",
    "gradient_clipping": "max_grad_norm",
    "resume_from_checkpoint": "resume",
    "auto_resume_from_checkpoints": "resume",
    "activation_checkpointing": "gradient_checkpointing",
    "num_processes": "nproc",
    "nproc_per_node": "nproc",
    "num_gpus": "nproc",
    "gpus": "nproc",
    "data_seed": "seed",
    # adapters and experts
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "target_modules": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "peft_use_rslora": "lora.use_rslora",
    "lora_model_dir": "lora.init_from",
    "adapter_name_or_path": "lora.init_from",
    "num_experts": "moe.num_experts",
    "top_k": "moe.top_k",
    "router_aux_loss_coef": "moe.router_aux_loss_coef",
    "router_loss_coef": "moe.router_aux_loss_coef",
    "chat_template_path": "data.chat_template",
    "split_special_tokens": "data.split_special_tokens",
}
_WRITE: dict[str, str] = {
    "tokenizer_name": "leave it out: the tokenizer is in the model's folder; with model.front_end=megatron write model.tokenizer",
    "tokenizer_name_or_path": "leave it out: the tokenizer is in the model's folder; with model.front_end=megatron write model.tokenizer",
    "bf16": "write model.dtype=bfloat16, or leave auto",
    "fp16": "float16 is not supported, whose small range needs a loss scale; write model.dtype=bfloat16, or float32 where there is none",
    "precision": "write model.dtype=bfloat16, or leave auto",
    "mixed_precision": "write model.dtype=bfloat16, or leave auto",
    "tf32": "leave it out: float32 matmuls are computed in full precision",
    "warmup_steps": "write warmup_ratio: warmup steps divided by max_steps",
    "evaluation_strategy": "write eval_steps=N, a number of steps between evaluations",
    "eval_strategy": "write eval_steps=N, a number of steps between evaluations",
    "save_strategy": "write save_steps=N, a number of steps between checkpoints",
    "val_set_size": "give held-out files in data.eval; no part of data.train is held out",
    "load_best_model_at_end": "keep checkpoints with save_total_limit, and choose by the losses in metrics.jsonl",
    "finetuning_type": "leave it out; moe.family says what is trained: mixlora, moe_lora or full",
    "stage": "leave it out; hecate trains on answers (supervised fine-tuning) and on plain text",
    "adapter": "leave it out; moe.family says what is trained, and lora.init_from an adapter to go on from",
    "optim": "leave it out; the optimizer is AdamW",
    "optimizer": "leave it out; the optimizer is AdamW",
    "fsdp": "leave it out; experts are sharded always, and with moe.family=moe_lora all else by model.shard_non_experts=true",
    "fsdp_config": "leave it out; experts are sharded always, and with moe.family=moe_lora all else by model.shard_non_experts=true",
    "deepspeed": "leave it out; experts are sharded always, and with moe.family=moe_lora all else by model.shard_non_experts=true",
    "expert_parallel_size": "leave it out; fssdp.policy=static_ep is static expert parallelism, auto is what hecate is for",
    "ddp_find_unused_parameters": "leave it out; experts that no token has reached are known",
    "dataloader_num_workers": "leave it out; rows are read from memory, and no worker is needed",
    "dataset_num_proc": "leave it out; data are tokenized once and kept in data.cache",
    "preprocessing_num_workers": "leave it out; data are tokenized once and kept in data.cache",
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
_NOT_SUPPORTED: dict[str, str] = {
    "load_in_4bit": "quantised base weights",
    "load_in_8bit": "quantised base weights",
    "quantization_bit": "quantised base weights",
    "use_dora": "DoRA",
    "peft_use_dora": "DoRA",
    "neftune_noise_alpha": "noise on embeddings",
    "push_to_hub": "uploading",
    "hub_model_id": "uploading",
    "rl": "training by preferences or rewards",
    "pref_beta": "training by preferences or rewards",
    "label_smoothing_factor": "label smoothing",
    "group_by_length": "sorting by length; data.packing wastes no tokens either",
    "context_parallel_size": "context parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "torch_compile": "compiling the model",
    "lora_modules_to_save": "training modules beside the adapters; model.train_non_experts does it with moe.family=full",
    "modules_to_save": "training modules beside the adapters; model.train_non_experts does it with moe.family=full",
}


def key_hint(key: str) -> str:
    """What to write in the place of another trainer's key, a hint for the message that refuses it. "" if the key is not known.

    Args:
        key: as it was given, such as lora_r or training.bf16; only its last part counts.
    """
    if key.partition(".")[0] in APPS:  # no other trainer has these, and the same words mean other keys of the run
        return ""
    name = key.rpartition(".")[2].replace("-", "_").lower()
    if name in _SAME:
        return f"write {_SAME[name]}"
    if name in _WRITE:
        return _WRITE[name]
    return f"not supported: {_NOT_SUPPORTED[name]}; leave it out" if name in _NOT_SUPPORTED else ""


def known_names() -> Iterator[tuple[str, str]]:
    """Every name of another trainer that is answered, and its answer."""
    for name in sorted({*_SAME, *_WRITE, *_NOT_SUPPORTED}):
        yield name, key_hint(name)


def same_keys() -> frozenset[str]:
    """The keys of hecate's that answers name as the same."""
    return frozenset(_SAME.values())
