"""What a checkpoint may be, and what is said of one that cannot be served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.device import resolve_device
from tandem.engine.model import load_model
from tandem.engine.model.loader import find_tensors, read_config
from tandem.errors import CheckpointError, ConfigError
from tandem.testing.checkpoints import CheckpointSpec, main, make_checkpoint, make_tokenizer

CPU = torch.device("cpu")
SPEC = CheckpointSpec(layers=1, vocab=280, max_positions=128)
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound"), SPEC)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sharded"), replace(SPEC, shards=2))


def configure(**fields: Any) -> Change:
    def change(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text()) | fields
        (path / "config.json").write_text(json.dumps(raw))

    return change


def retensor(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")

    return change


def write(name: str, text: str) -> Change:
    def change(path: Path) -> None:
        (path / name).write_text(text)

    return change


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


Q = "model.layers.0.self_attn.q_proj.weight"
WRONG: dict[str, tuple[Change, str]] = {
    "architecture": (configure(architectures=["GPT2Model"]), "GPT2Model is not supported; supported are LlamaFor"),
    "no architecture": (configure(architectures=None), "architectures is None"),
    "rope": (configure(rope_parameters={"rope_type": "ntk"}), "rope_type is 'ntk'; supported are default"),
    "rope factor": (configure(rope_parameters={"rope_type": "linear"}), "rope_parameters: factor is missing"),
    "rope bands": (
        configure(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "rope_parameters: low_freq_factor is missing",
    ),
    "partial rotation": (
        configure(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5: this family rotates whole heads",
    ),
    "activation": (configure(hidden_act="relu"), "hidden_act is 'relu': supported are silu, gelu"),
    "quantised": (configure(quantization_config={"bits": 4}), "quantised checkpoints are not supported"),
    "no field": (configure(hidden_size=None), "hidden_size is missing"),
    "text for a number": (configure(hidden_size="64"), "hidden_size is '64'; an integer of at least 1 is needed"),
    "negative": (configure(num_hidden_layers=-1), "num_hidden_layers is -1; an integer of at least 1"),
    "heads": (configure(num_key_value_heads=3), "num_key_value_heads is 3: it must divide num_attention_heads 4"),
    "odd head": (configure(head_dim=15), "head_dim is 15; rotary embeddings need an even one"),
    "flag": (configure(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'; true or false"),
    "eos": (configure(eos_token_id=["x"]), "eos_token_id is ['x']; a token id or a list"),
    "eos range": (write("generation_config.json", '{"eos_token_id": 280}'), "280 is outside the vocabulary of 280"),
    "eight bits": (configure(dtype="float8_e4m3fn"), "names dtype float8_e4m3fn; choose one of bfloat16, float32"),
    "no dtype": (configure(dtype=None), "names no dtype"),
    "not JSON": (write("config.json", "{"), "is not JSON"),
    "not an object": (write("config.json", "[]"), "holds a list; an object is needed"),
    "no config": (lambda path: (path / "config.json").unlink(), "cannot read"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "missing": (retensor(lambda t: t.pop(Q)), f"tensor {Q} is missing; expected shape [64, 64]"),
    "shape": (retensor(lambda t: t.update({Q: torch.zeros(64, 32)})), f"{Q} has shape [64, 32]; expected [64, 64]"),
    "unexpected": (
        retensor(lambda t: t.update({"model.layers.1.x": torch.zeros(2)})),
        "model.layers.1.x of shape [2] is unexpected",
    ),
    "integers": (
        retensor(lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
        f"{Q} has dtype I8; expected F32, BF16 or F16",
    ),
    "cut short": (cut, "is cut short"),
    "empty": (write("model.safetensors", ""), "is cut short: 0 bytes"),
    "not safetensors": (write("model.safetensors", "\x08" + "\0" * 7 + "not json"), "is not a safetensors file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_refused_in_one_line_that_names_the_fault(case: str, sound: Path, tmp_path: Path) -> None:
    change, message = WRONG[case]
    path = shutil.copytree(sound, tmp_path / "wrong")
    change(path)
    with pytest.raises(CheckpointError) as caught:
        load_model(path, "auto", CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint folder at .*nowhere"):
        load_model(tmp_path / "nowhere", "auto", CPU)


def test_an_index_must_name_files_that_hold_its_tensors(sharded: Path, tmp_path: Path) -> None:
    path = shutil.copytree(sharded, tmp_path / "wrong")
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places = index["weight_map"]
    places[Q] = next(name for name in places.values() if name != places[Q])
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which does not hold it"):
        find_tensors(path)
    places[Q] = "../model.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map must name a file of this folder"):
        find_tensors(path)
    places[Q] = "model-3.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"cannot read .*model-3"):
        find_tensors(path)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"]}, [64]),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": None, "max_window_layers": 0}, [64]),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": None, "max_window_layers": 1}, [None]),
        ({"use_sliding_window": True, "sliding_window": 128, "layer_types": ["sliding_attention"]}, [None]),
        ({"use_sliding_window": False, "sliding_window": 64, "layer_types": None, "max_window_layers": 0}, [None]),
    ],
)
def test_windows_are_where_the_configuration_says(
    fields: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, replace(SPEC, family="qwen2"))
    configure(**fields)(path)
    config = read_config(path)
    assert [layer.window for layer in config.layers] == windows
    assert [group.window for group in load_model(path, "auto", CPU).layout.groups] == windows


def test_a_head_stored_beside_a_tied_embedding_must_equal_it(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, replace(SPEC, tied=True))
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    retensor(lambda t: t.update({"lm_head.weight": embedding.clone()}))(path)
    load_model(path, "auto", CPU)
    retensor(lambda t: t.update({"lm_head.weight": embedding + 1}))(path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load_model(path, "auto", CPU)


def test_the_fingerprint_follows_the_model_and_not_its_files(sound: Path, sharded: Path, tmp_path: Path) -> None:
    first = load_model(sound, "auto", CPU).fingerprint
    assert len(first) == 32
    assert load_model(sharded, "auto", CPU).fingerprint == first
    assert load_model(make_checkpoint(tmp_path / "seed", replace(SPEC, seed=1)), "auto", CPU).fingerprint != first
    path = shutil.copytree(sound, tmp_path / "theta")
    configure(rope_parameters={"rope_type": "default", "rope_theta": 5e5})(path)
    assert load_model(path, "auto", CPU).fingerprint != first


def test_the_dtype_asked_for_is_that_of_weights_and_kv(sound: Path) -> None:
    loaded = load_model(sound, "bfloat16", CPU)
    assert {tensor.dtype for tensor in loaded.module.tensors().values()} == {torch.bfloat16}
    assert {plane.dtype for plane in loaded.layout.planes} == {"bfloat16"}
    assert loaded.layout.token_bytes == 1 * 2 * (2 * 16) * 2


def test_half_precision_is_served_in_bfloat16_unless_asked_otherwise(sound: Path, tmp_path: Path) -> None:
    path = shutil.copytree(sound, tmp_path / "half")
    configure(dtype="float16")(path)
    assert load_model(path, "auto", CPU).dtype == torch.bfloat16
    assert load_model(path, "float32", CPU).dtype == torch.float32


def test_end_of_sequence_ids_are_those_of_both_configurations(sound: Path, tmp_path: Path) -> None:
    path = shutil.copytree(sound, tmp_path / "eos")
    assert read_config(path).eos_token_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load_model(path, "auto", CPU).info("m").eos_token_ids == (3, 4, 2)
    (path / "generation_config.json").unlink()
    assert read_config(path).eos_token_ids == (2,)


def test_the_context_may_be_lowered_and_raised_only_as_far_as_the_rotation_reaches(sound: Path, tmp_path: Path) -> None:
    loaded = load_model(sound, "auto", CPU)
    assert loaded.info("m").max_context == 128
    assert loaded.info("m", 100).max_context == 100
    with pytest.raises(ConfigError, match="max_context is 129; the model serves at most 128"):
        loaded.info("m", 129)
    path = shutil.copytree(sound, tmp_path / "yarn")
    configure(rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128})(path)
    yarn = load_model(path, "auto", CPU)
    assert yarn.info("m").max_context == 128
    assert yarn.info("m", 512).max_context == 512


def test_made_checkpoints_repeat_and_their_tokenizer_round_trips(sound: Path, tmp_path: Path) -> None:
    main([str(tmp_path), "--layers", "1", "--vocab", "280", "--max-positions", "128"])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (sound / name).read_bytes()
    tokenizer = make_tokenizer(1200)
    text = "Zwölf Boxkämpfer\n\tjagen 12 Viktor 😀 the end"
    ids = tokenizer.encode(text)
    assert len(tokenizer) == 1200
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>hi<|end|><|assistant|>"
    with pytest.raises(ValueError, match=r"vocab is 200; it must be in \[262, "):
        make_tokenizer(200)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{name}'"):
        resolve_device(name)
