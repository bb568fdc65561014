"""Specs that are right: read by Python in ``test_api_mistakes.py``, by a real API server in ``test_admission.py``."""

from dataclasses import dataclass
from typing import Any

from tests.unit.bad_specs import GOOD as BASE
from tests.unit.bad_specs import JUDGE, changed


@dataclass(frozen=True)
class Good:
    """One good spec."""

    id: str
    change: dict[str, Any]

    @property
    def object(self) -> dict[str, Any]:
        """The whole object."""
        return changed(BASE, self.change)


GOOD: tuple[Good, ...] = (
    Good("the least", {}),
    Good("nothing but an empty method", {"spec.method": {}}),
    Good("an adapter to train on", {"spec.model.adapters": [{"uri": "job://first", "train": True}]}),
    Good(
        "an adapter on top of two",
        {"spec.model.adapters": [{"uri": "hf://org/name", "revision": "v1"}, {"uri": "pvc://claim/second"}]},
    ),
    Good(
        "full fine-tuning on top of an adapter under ZeRO-3",
        {
            "spec.model.adapters": [{"uri": "s3://team/first"}],
            "spec.method": {"type": "full"},
            "spec.deepspeed.zero_optimization.stage": 3,
        },
    ),
    Good("full fine-tuning", {"spec.method": {"type": "full"}, "spec.deepspeed.zero_optimization.stage": 3}),
    Good("lora by rank alone", {"spec.method": {"r": 8}}),
    Good(
        "lora in all words",
        {
            "spec.method": {
                "type": "lora",
                "r": 64,
                "lora_alpha": 12.5,
                "lora_dropout": 0.05,
                "target_modules": ["q_proj", "v_proj"],
                "modules_to_save": ["lm_head"],
                "use_rslora": True,
                "use_dora": True,
            }
        },
    ),
    Good("modules by a pattern", {"spec.method.target_modules": r".*\.(q|v)_proj"}),
    Good(
        "qlora",
        {
            "spec.method": {"type": "qlora", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            "spec.deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "aio": {}},
        },
    ),
    Good(
        "lora, the newer words",
        {
            "spec.method": {
                "type": "lora",
                "init_lora_weights": "pissa_niter_4",
                "loraplus_lr_ratio": 16,
                "rank_pattern": {"q_proj": 8},
                "alpha_pattern": {"q_proj": 4.5},
                "layers_to_transform": [0, 1],
            }
        },
    ),
    Good("the last layers and the head", {"spec.method": {"type": "freeze", "freeze_extra_modules": "lm_head|norm"}}),
    Good("some biases", {"spec.method": {"type": "bitfit", "bias_terms": ["query", "layer_norm"]}}),
    Good("AdaLoRA", {"spec.method": {"type": "adalora", "target_r": 4, "deltaT": 10}, "spec.training.max_steps": 100}),
    Good(
        "a prompt",
        {
            "spec.method": {
                "type": "prompt_tuning",
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "x",
            }
        },
    ),
    Good("tokens", {"spec.method": {"type": "trainable_tokens", "token_indices": [5, 6]}}),
    Good("parallel adapters", {"spec.method": {"type": "adapter", "adapter_variant": "parallel", "scaling": 4}}),
    Good("MAM", {"spec.method": {"type": "mam", "prefix_projection": False}, "spec.data.packing": True}),
    Good("UniPELT", {"spec.method": {"type": "unipelt", "r": 4}, "spec.training.gradient_checkpointing": True}),
    Good("tasks", {"spec.method": {"type": "moelora", "tasks": ["ner", "qa"], "num_experts": 4, "r": 8}}),
    Good("a chain", {"spec.model.uri": "job://first", "spec.output.merge": True}),
    Good("a GGUF file of the hub", {"spec.model": {"uri": "hf://a/b", "revision": "v1", "gguf_file": "q4.gguf"}}),
    Good("a model without an organisation", {"spec.model.uri": "hf://gpt2"}),
    Good(
        "claims",
        {"spec.model.uri": "pvc://models/a/b", "spec.output.uri": "pvc://out", "spec.checkpoint.uri": "pvc://out"},
    ),
    Good(
        "many sources",
        {
            "spec.data": {
                "train": [
                    {"uri": "hf://datasets/a/b", "split": "validation", "revision": "abc", "weight": 0.5},
                    {"uri": "hf://datasets/a/b", "split": "test", "format": "messages"},
                    {"uri": "pvc://claim/rows.json"},
                    {"uri": "file:///data/rows.parquet"},
                    {"uri": "gs://bucket/folder/"},
                    {"uri": "s3://bucket/rows/**/part-[0-9]*.csv.zst", "columns": {"question": "instruction"}},
                    {"uri": "s3://bucket/books/*.txt", "sample_by": "document"},
                ],
                "eval": [{"uri": "az://container/rows.jsonl", "format": "messages"}],
                "max_length": 4096,
                "packing": True,
                "max_bad_rows": 100,
                "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
            },
            "spec.training.eval_steps": 50,
        },
    ),
    Good("stretched positions", {"spec.model.rope_parameters": {"rope_type": "yarn", "factor": 4}}),
    Good("the name of a template", {"spec.data.chat_template": "llama-2"}),
    Good(
        "every number of the training",
        {
            "spec.training": {
                "learning_rate": 1e-5,
                "num_train_epochs": 0.5,
                "max_steps": 100,
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 2,
                "gradient_accumulation_steps": 8,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "warmup_steps": 0.03,
                "weight_decay": 0.1,
                "adam_beta1": 0,
                "adam_beta2": 0.95,
                "adam_epsilon": 1e-6,
                "max_grad_norm": 0,
                "gradient_checkpointing": True,
                "neftune_noise_alpha": 5,
                "logging_steps": 10,
                "seed": 4294967295,
            }
        },
    ),
    Good("warm-up in steps", {"spec.training": {"warmup_steps": 10, "lr_scheduler_type": "constant_with_warmup"}}),
    Good("questions", {"spec.evaluation": {"prompts": ["Who are you?", "你是谁？"], "max_new_tokens": 32}}),
    Good(
        "a pod template",
        {
            "spec.workers": {
                "replicas": 2,
                "gpusPerWorker": 8,
                "template": {
                    "metadata": {"labels": {"team": "a"}, "annotations": {"x": "y"}},
                    "spec": {
                        "nodeSelector": {"gpu": "h100"},
                        "tolerations": [{"operator": "Exists"}],
                        "terminationGracePeriodSeconds": 120,
                        "containers": [
                            {
                                "name": "trainer",
                                "image": "mine",
                                "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
                                "resources": {"limits": {"nvidia.com/gpu": 8, "memory": "900Gi"}},
                            },
                            {"name": "sidecar", "image": "x", "command": ["sleep", "inf"]},
                        ],
                        "volumes": [
                            {"name": "scratch", "emptyDir": {}},
                            {"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}},
                        ],
                    },
                },
            }
        },
    ),
    Good("on the CPU", {"spec.workers.gpusPerWorker": 0, "spec.model.dtype": "float32"}),
    Good(
        "all that steers",
        {
            "spec.suspend": True,
            "spec.ttlSecondsAfterFinished": 0,
            "spec.profile": "h100",
            "spec.credentials": {"secretName": "s3.team"},
            "spec.recovery": {"maxRestarts": 0, "hangTimeout": "1h30m", "startTimeout": "1m"},
            "spec.checkpoint": {"uri": "s3://a/b", "save_steps": 10, "save_total_limit": 1, "resume": "never"},
            "spec.output": {"uri": "az://a/b", "max_shard_size": "2.5GiB"},
        },
    ),
    Good("the longest name", {"metadata.name": "x" * 51}),
    Good("null for what is optional", {"spec.training": None, "spec.checkpoint": {"uri": None}}),
    Good("whole floats for integers", {"spec.workers.replicas": 2.0, "spec.training.max_steps": 10.0}),
    Good(
        "the best model, in good time",
        {
            "spec.data.eval": [{"uri": "s3://team/held-out.jsonl"}],
            "spec.training": {
                "load_best_model_at_end": True,
                "metric_for_best_model": "loss/held-out",
                "greater_is_better": False,
                "early_stopping_patience": 2,
                "early_stopping_threshold": 0.01,
            },
        },
    ),
    Good(
        "long texts, looked at by position",
        {
            "spec.data.eval": [{"uri": "s3://team/held-out.jsonl"}],
            "spec.training.eval_on_start": True,
            "spec.evaluation.perplexity_positions": [256, 1024],
        },
    ),
    Good("continued pretraining, packed", {"spec.stage": "pretrain", "spec.data.packing": True}),
    Good("the last answers only", {"spec.stage": "sft", "spec.sft": {"loss_on": "last_answer"}}),
    Good(
        "dpo in all words",
        {
            "spec.stage": "dpo",
            "spec.dpo": {
                "loss_type": "sigmoid_norm",
                "beta": 0.2,
                "rpo_alpha": 1,
                "ld_alpha": 0.5,
                "precompute_ref_log_probs": True,
            },
        },
    ),
    Good("dpo in few words", {"spec.stage": "dpo"}),
    Good("an empty section", {"spec.stage": "orpo", "spec.orpo": {}}),
    Good("a centred reward", {"spec.stage": "reward", "spec.reward": {"center_rewards_coefficient": 0.01}}),
    Good("kto with weights", {"spec.stage": "kto", "spec.kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5}}),
    Good("rows of another job", {"spec.stage": "dpo", "spec.data.train[0].uri": "job://pairs"}),
    Good(
        "a judge behind an endpoint",
        {
            "spec.stage": "rlaif",
            "spec.rlaif": {
                "judge": {
                    **JUDGE,
                    "criteria": "short",
                    "max_concurrency": 64,
                    "timeout": "1m30s",
                    "extra_body": {"reasoning_effort": "low"},
                },
                "num_generations": 4,
                "temperature": 0.7,
            },
            "spec.training.seed": 7,
        },
    ),
    Good(
        "a judge to load, and a question of one's own",
        {
            "spec.stage": "rlaif",
            "spec.rlaif.judge": {"uri": "job://judge", "prompt": "{prompt} {answer_a} {answer_b} [[A]] [[B]] [[C]]"},
        },
    ),
    Good("ppo with a reward model", {"spec.stage": "ppo", "spec.ppo": {"reward_model": {"uri": "job://reward"}}}),
    Good(
        "ppo in more words",
        {
            "spec.stage": "ppo",
            "spec.ppo": {
                "reward_model": {"uri": "hf://team/reward", "revision": "v2", "weight": 0.5},
                "reward_funcs": [{"type": "length", "target_length": 50, "weight": -1}],
                "kl_target": 6,
                "missing_eos_penalty": 1,
                "num_mini_batches": 2,
            },
            "spec.data.eval": [{"uri": "s3://team/held-out.jsonl"}],
            "spec.training.load_best_model_at_end": True,
            "spec.training.metric_for_best_model": "eval_reward/held-out",
        },
    ),
    Good(
        "grpo with every reward function",
        {
            "spec.stage": "grpo",
            "spec.grpo": {
                "reward_funcs": [
                    {"type": "exact_match", "pattern": r"####\s*(.+)", "column": "solution"},
                    {"type": "format", "pattern": "<answer>.*</answer>"},
                    {"type": "python", "uri": "s3://team/rewards.py", "function": "clear"},
                ],
                "loss_type": "luspo",
                "importance_sampling_level": "sequence",
            },
        },
    ),
    Good(
        "labels in an order",
        {
            "spec.stage": "sequence_classification",
            "spec.sequence_classification": {
                "labels": ["contradiction", "neutral", "entailment"],
                "problem_type": "single_label_classification",
            },
        },
    ),
    Good(
        "a regression",
        {"spec.stage": "sequence_classification", "spec.sequence_classification": {"problem_type": "regression"}},
    ),
    Good("tags as they come", {"spec.stage": "token_classification", "spec.method": {"type": "p_tuning_v2"}}),
    Good(
        "summaries",
        {
            "spec.stage": "seq2seq",
            "spec.seq2seq": {"source_prefix": "summarize: ", "max_target_length": 64},
            "spec.data.eval": [{"uri": "s3://a/b.jsonl"}],
            "spec.evaluation": {"predict_with_generate": True, "generation_num_beams": 4, "prompts": ["A long text."]},
        },
    ),
)
