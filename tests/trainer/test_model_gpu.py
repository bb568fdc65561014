"""On a GPU in bfloat16: rows stay apart, checkpointing changes nothing, results are read back."""

import pytest

torch = pytest.importorskip("torch", reason="needs the trainer extra")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZES = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPU = torch.device("cuda")


def built(kind, folder):
    """A model of two and a half million weights, large enough for its logits to differ."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    common = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    quiet = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = {
        "llama": lambda: LlamaConfig(**common, **SIZES),
        "qwen2": lambda: Qwen2Config(**common, **SIZES),
        "gpt2": lambda: GPT2Config(n_embd=256, n_layer=4, n_head=4, initializer_range=0.1, **quiet, **SIZES),
    }[kind]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loaded(folder, **changes):
    from finetune_trainer.model import load_model
    from tests.trainer.tiny import make_config

    model = {"uri": f"file://{folder}", "dtype": "auto"}
    config = make_config(folder.parent, model=model, accelerator="gpu", **changes)
    return config, load_model(folder, config, GPU)


def relative(a, b):
    return float((a.float() - b.float()).abs().mean() / b.float().abs().mean())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_packed_rows_do_not_see_each_other(kind, tmp_path):
    _, model = loaded(built(kind, tmp_path / "model"), data={"packing": True})  # proven while loading, too
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    rows = [torch.randint(3, 512, (length,), device=GPU) for length in (100, 37, 119)]
    positions = torch.cat([torch.arange(len(row), device=GPU) for row in rows])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(rows)[None], position_ids=positions).logits[0]
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        mixed = model(input_ids=torch.cat(rows)[None]).logits[0]
    assert relative(packed, alone) < 0.02
    assert relative(mixed[100:], alone[100:]) > 0.2, "the comparison can fail"


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lora"}, {"type": "qlora"}], ids=lambda m: m["type"])
def test_checkpointing_gives_the_same_gradients_and_the_adapter_is_read_back(method, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune_trainer.methods import METHODS
    from finetune_trainer.model import parameter_counts

    if method["type"] == "qlora":
        pytest.importorskip("bitsandbytes")
    folder = built("llama", tmp_path / "model")
    ids = torch.randint(3, 512, (2, 128), device=GPU)
    gradients = []
    for checkpointing in (False, True):
        config, model = loaded(folder, method=method, training={"gradient_checkpointing": checkpointing})
        torch.manual_seed(0)
        model = METHODS[method["type"]].prepare(model, config.method, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad]))
    assert relative(gradients[1], gradients[0]) < 0.01
    assert parameter_counts(model)[1] >= 2_500_000  # 4-bit weights count as what they stand for

    class NoTokenizer:
        def save_pretrained(self, directory):
            pass

    METHODS[method["type"]].save(model, NoTokenizer(), tmp_path / "out", None, config)
    if method["type"] == "lora":
        model.eval()
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(GPU)
            again = PeftModel.from_pretrained(base, tmp_path / "out").eval()(input_ids=ids).logits
        assert relative(again, expected) < 1e-3
