"""What other tools call our fields. Asked by ``mistakes.py`` where a field is written that does not exist.

Names are compared without case, underscores and hyphens. A test sees that every field named here exists.
"""

from collections.abc import Iterable

from finetune_api.checks import close

_FOREIGN: dict[str, str] = {
    "spec.model.uri": "base_model model_name model_name_or_path model_id model_path pretrained_model "
    "pretrained_model_name_or_path",
    "spec.model.dtype": "bf16 fp16 torch_dtype precision mixed_precision float16 bfloat16 half compute_dtype",
    "spec.model.gguf_file": "gguf",
    "spec.model.adapters": "adapter_name_or_path lora_path adapter_path lora_model_dir",
    "spec.method.type": "finetuning_type peft_type peft_method load_in_4bit load_in_8bit quantization quantization_bit "
    "use_lora use_peft bits",
    "spec.method.r": "lora_r lora_rank rank lora_dim",
    "spec.method.lora_alpha": "alpha lora_scaling",
    "spec.method.lora_dropout": "dropout",
    "spec.method.target_modules": "lora_target lora_target_modules lora_modules lora_target_linear",
    "spec.method.modules_to_save": "additional_target lora_modules_to_save",
    "spec.data.train": "dataset datasets dataset_name dataset_path train_file train_data train_dataset training_data "
    "data_path train_files",
    "spec.data.eval": "eval_dataset eval_data eval_file validation validation_file val_data test_datasets val_set_size "
    "held_out",
    "spec.data.max_length": "cutoff_len max_seq_length max_seq_len sequence_len sequence_length seq_length seq_len "
    "model_max_length block_size context_length max_tokens max_prompt_length",
    "spec.data.packing": "sample_packing pack neat_packing",
    "spec.data.chat_template": "template prompt_template conversation_template",
    "spec.training.learning_rate": "lr",
    "spec.training.num_train_epochs": "epochs num_epochs n_epochs train_epochs max_epochs",
    "spec.training.max_steps": "steps num_steps train_steps total_steps iters",
    "spec.training.per_device_train_batch_size": "batch_size batch train_batch_size micro_batch_size micro_batch "
    "per_gpu_train_batch_size per_device_batch_size",
    "spec.training.per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "spec.training.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulate_grad_batches",
    "spec.training.lr_scheduler_type": "lr_scheduler scheduler learning_rate_scheduler",
    "spec.training.warmup_steps": "warmup warmup_ratio warmup_fraction",
    "spec.training.max_grad_norm": "gradient_clipping grad_clip clip_grad clip_grad_norm gradient_clip_val",
    "spec.training.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
    "spec.training.eval_steps": "evaluation_strategy eval_strategy eval_interval evals_per_epoch val_check_interval",
    "spec.training.logging_steps": "log_steps log_interval log_every_n_steps",
    "spec.training.seed": "random_seed",
    "spec.sft.loss_on": "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss",
    "spec.evaluation.prompts": "prompt test_prompts sample_prompts",
    "spec.evaluation.max_new_tokens": "max_new_length generation_max_new_tokens",
    "spec.deepspeed.zero_optimization.stage": "zero_stage zero stage3 zero3 fsdp",
    "spec.workers.replicas": "nodes num_nodes nnodes node_count worker_count num_workers worker_replicas",
    "spec.workers.gpusPerWorker": "gpus gpu num_gpus n_gpus ngpus gpu_count nproc_per_node num_processes gpus_per_node "
    "num_proc_per_worker gpus_per_replica",
    "spec.workers.template": "node_selector tolerations affinity resources pod_template volumes env",
    "spec.checkpoint.resume": "resume_from_checkpoint resume_from auto_resume",
    "spec.checkpoint.save_steps": "save_strategy save_interval checkpoint_interval checkpoint_every",
    "spec.output.uri": "output_dir out_dir output_path save_dir output_uri path",
    "spec.output.merge": "merge_lora merge_adapter save_merged",
    "spec.recovery.maxRestarts": "backoff_limit max_retries retries restart_limit max_failures",
    "spec.credentials.secretName": "secret hf_token token hub_token secret_ref image_pull_secrets",
    "spec.profile": "image gpu_type accelerator",
    "spec.ttlSecondsAfterFinished": "ttl ttl_seconds",
}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


FOREIGN = {_plain(name): field for field, names in _FOREIGN.items() for name in names.split()}
"""Plain name → our field."""


def meant(name: str, section: str, siblings: Iterable[str], fields: Iterable[str]) -> str | None:
    """The field that was probably meant by ``name`` in ``section``: the name of a sibling, or a whole path.

    A sibling with nearly that name; what other tools call so; a field of that name elsewhere; a sibling rather like it.
    """
    siblings = list(siblings)
    if spelt := close(name, siblings, 0.85):
        return spelt
    known = FOREIGN.get(_plain(name)) or next((f for f in fields if f.rpartition(".")[2] == name), None)
    home, _, last = (known or "").rpartition(".")
    return (last if home == section and last in siblings else known) or close(name, siblings)
