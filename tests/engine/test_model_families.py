"""What a family's checkpoint may look like: spellings, names, defaults, dtypes, and what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.model.config import LayerConfig, ModelConfig
from tandem.engine.model.decoder import layer_groups
from tandem.engine.model.fields import Fields
from tandem.engine.model.layers import Place
from tandem.engine.model.loader import read_config
from tandem.engine.model.registry import FAMILIES, family_of
from tandem.engine.model.rope import inverse_frequencies
from tandem.errors import CheckpointError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint, make_config, make_model
from tandem.testing.families import LLAMA3, VARIANTS, WINDOW
from tandem.testing.model_table import architecture_of
from tandem.testing.runner_loop import RunnerLoop

CPU = torch.device("cpu")
SOURCE = random.Random(5)
PROMPT = [SOURCE.randrange(6, 300) for _ in range(120)]
PLAIN = ("llama", "qwen2", "qwen3", "mistral", "ministral", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3")
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""What every checkpoint names."""


def load(path: Path, spec: CheckpointSpec) -> LoadedModel:
    return load_model(make_checkpoint(path, spec), "auto", CPU)


def configure(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    file = path / "config.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    return path


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.float()


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("family", PLAIN)
def test_bfloat16_stays_as_close_to_the_exact_result_as_transformers(
    family: str, kernels: Literal["torch", "auto"], tmp_path: Path
) -> None:
    spec = replace(VARIANTS[family], dtype="bfloat16", std=0.1)
    loaded = load_model(make_checkpoint(tmp_path, spec), "auto", CPU, choose_kernels(kernels, CPU))
    assert loaded.layout.planes[0].dtype == "bfloat16"
    ours, theirs = RunnerLoop(loaded).logits(PROMPT), reference_logits(make_model(spec), PROMPT)
    exact = reference_logits(make_model(replace(spec, dtype="float32")).bfloat16().float(), PROMPT)
    assert ours.dtype == torch.float32
    assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()


def without(**fields: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, **fields)


def windows(window: int | None) -> Callable[[ModelConfig], ModelConfig]:
    def change(config: ModelConfig) -> ModelConfig:
        return replace(config, layers=tuple(replace(x, window=x.window and window) for x in config.layers))

    return change


CHANGES: dict[str, tuple[str, Callable[[ModelConfig], ModelConfig]]] = {
    "window": ("mistral", windows(None)),
    "one token more": ("mistral", windows(WINDOW + 1)),
    "one token less": ("gemma3", windows(WINDOW - 1)),
    "score cap": ("gemma2", without(attention_softcap=None)),
    "logit cap": ("gemma2", without(logit_softcap=None)),
    "score scale": ("gemma2", without(attention_scale=16**-0.5)),
    "embedding scale": ("gemma2", without(embedding_scale=1.0)),
    "second rotation": ("gemma3", lambda c: replace(c, ropes=c.ropes[:1] * 2)),
    "activation": ("gemma2", without(activation="silu")),
    "tanh": ("llama-gelu", without(activation="gelu_tanh")),
    "norm offset": ("gemma2", lambda c: replace(c, norm=replace(c.norm, offset=0.0))),
    "residual scale": ("granite", without(residual_scale=1.0)),
    "logit divisor": ("granite", without(logit_divisor=1.0)),
    "blind layers": ("smollm3", without(layers=(LayerConfig(),) * 4)),
    "stretch": ("phi3-longrope", lambda c: replace(c, ropes=(replace(c.ropes[0], stretch=(1.0,) * 8),))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_option_changes_what_a_model_says(name: str, tmp_path: Path) -> None:
    family, change = CHANGES[name]
    loaded = load(tmp_path, VARIANTS[family])
    architecture = FAMILIES[loaded.config.architecture]
    module = architecture.build(change(loaded.config), Place(torch.float32, CPU))
    for own, stored in zip(module.tensors().values(), loaded.module.tensors().values(), strict=True):
        own.copy_(stored)
    changed = replace(loaded, module=module, config=change(loaded.config))
    right, wrong = RunnerLoop(loaded).logits(PROMPT), RunnerLoop(changed).logits(PROMPT)
    assert (right - wrong).abs().max() > 1e-3, "the comparison with transformers would not see it"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fields_that_are_left_out_have_the_defaults_of_transformers(architecture: str) -> None:
    types = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind != "gemma3"}
    kind = types.get(architecture, "gemma3_text")
    full = AutoConfig.for_model(kind).to_dict()
    named = {name: full[name] for name in SHAPE}
    if architecture == "Gemma3ForConditionalGeneration":
        full, named = {"text_config": full}, {"text_config": {"hidden_size": full["hidden_size"]}}
    names = {"architectures": [architecture]}
    whole, bare = (Fields(raw | names, "config.json") for raw in (full, named))
    family = family_of(whole)
    left, right = (replace(family.parse(fields), eos_token_ids=(), dtype="") for fields in (whole, bare))
    assert left == right


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "smollm3"])
def test_the_older_spelling_of_the_configuration_means_the_same(family: str, tmp_path: Path) -> None:
    spec = replace(VARIANTS[family], dtype="bfloat16")
    new = load(tmp_path, replace(spec, config=spec.config | {"rope_parameters": LLAMA3}))

    def respell(raw: dict[str, Any]) -> None:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        raw["torch_dtype"] = raw.pop("dtype")

    old = load_model(configure(tmp_path, respell), "auto", CPU)
    assert old.config == new.config
    assert old.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_longrope_has_had_other_names_in_phi3(name: str, tmp_path: Path) -> None:
    new = load(tmp_path, VARIANTS["phi3-longrope"]).config

    def respell(raw: dict[str, Any]) -> None:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope["rope_theta"]
        raw["rope_scaling"] = {"type": name, **{key: rope[key] for key in ("short_factor", "long_factor")}}

    assert read_config(configure(tmp_path, respell)) == new


def test_gemma3_has_had_its_rotations_side_by_side(tmp_path: Path) -> None:
    new = load(tmp_path, VARIANTS["gemma3"]).config

    def respell(raw: dict[str, Any]) -> None:
        rope = raw.pop("rope_parameters")
        raw["rope_scaling"] = {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}
        raw |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
        del raw["layer_types"]

    assert read_config(configure(tmp_path, respell)) == new


@pytest.mark.parametrize("prefixes", [("language_model.", ""), ("model.language_model.", "model.")])
def test_the_text_model_of_a_multimodal_gemma3_is_served(prefixes: tuple[str, str], tmp_path: Path) -> None:
    text = load(tmp_path, VARIANTS["gemma3"])
    prefix, vision = prefixes
    tensors = load_file(tmp_path / "model.safetensors")
    strip = "model." if prefix.startswith("model.") else ""
    renamed = {prefix + name.removeprefix(strip): tensor for name, tensor in tensors.items()}
    renamed |= {f"{vision}vision_tower.x": torch.zeros(2), f"{vision}multi_modal_projector.y": torch.zeros(2)}
    save_file(renamed, tmp_path / "model.safetensors")

    def nest(raw: dict[str, Any]) -> None:
        inner = {name: raw.pop(name) for name in list(raw) if name not in ("dtype", "eos_token_id")}
        raw |= {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner, "vision_config": {}}

    loaded = load_model(configure(tmp_path, nest), "auto", CPU)
    assert replace(loaded.config, architecture=text.config.architecture) == text.config
    torch.testing.assert_close(RunnerLoop(loaded).logits(PROMPT), RunnerLoop(text).logits(PROMPT))


def test_names_without_the_prefix_of_the_base_model_are_understood(tmp_path: Path) -> None:
    spec = VARIANTS["qwen3"]
    expected = RunnerLoop(load(tmp_path, spec)).logits(PROMPT)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    torch.testing.assert_close(RunnerLoop(load_model(tmp_path, "auto", CPU)).logits(PROMPT), expected)


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_tensors_may_lie_in_any_shard_in_any_order(family: str, tmp_path: Path) -> None:
    whole = load(tmp_path / "whole", VARIANTS[family])
    path = make_checkpoint(tmp_path / "sharded", VARIANTS[family])
    tensors, places = load_file(path / "model.safetensors"), {}
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    random.Random(1).shuffle(names)
    for shard in range(5):
        file = f"part-{9 - shard}.safetensors"
        save_file({name: tensors[name] for name in names[shard::5]}, path / file)
        places.update(dict.fromkeys(names[shard::5], file))
    order = random.Random(2).sample(names, len(names))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: places[n] for n in order}}))
    sharded = load_model(path, "auto", CPU)
    assert sharded.fingerprint == whole.fingerprint
    assert torch.equal(RunnerLoop(sharded).logits(PROMPT), RunnerLoop(whole).logits(PROMPT))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "phi3 rope": (
        "phi3",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_parameters is .*Phi 3 has",
    ),
    "unknown rope": ("phi3", {"rope_parameters": {"rope_type": "ntk"}}, "rope_type is 'ntk'; supported are"),
    "divisors": (
        "phi3-longrope",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
        "long_factor is .*; a list of 8 numbers greater than 0 is needed",
    ),
    "odd rotation": (
        "phi3",
        {"partial_rotary_factor": 0.2},
        "partial_rotary_factor is 0.2: of head_dim 16 it leaves 3",
    ),
    "part of a head": ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: this family rotates"),
    "position scale": (
        "mistral",
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta is 0.1: it is not supported",
    ),
    "chunked": ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*; a list of 2, one for each"),
    "few types": ("gemma2", {"layer_types": ["full_attention"]}, "layer_types is .*; a list of 4, one for each layer"),
    "no windows": ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is None: a number is needed"),
    "no window": ("gemma2", {"sliding_window": None}, "sliding_window is None: a number is needed"),
    "window": ("mistral", {"sliding_window": 0}, "sliding_window is 0; an integer of at least 1"),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True: only causal"),
    "capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0: Gemma 3 does not"),
    "cap": ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0; a number greater than 0"),
    "blind layers": ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers is .* a list of 4, one for each"),
    "activation": ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu': supported are silu"),
    "quantised": ("gemma3", {"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
    "sinks": ("llama", {"architectures": ["GptOssForCausalLM"]}, "architecture GptOssForCausalLM is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_the_name_of_its_field(case: str, tmp_path: Path) -> None:
    family, fields, message = REFUSED[case]
    make_checkpoint(tmp_path, VARIANTS[family])
    with pytest.raises(CheckpointError, match=message):
        read_config(configure(tmp_path, lambda raw: raw.update(fields)))


def test_unexpected_tensors_such_as_sinks_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, VARIANTS["llama"])
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.sinks": torch.zeros(4)}, file)
    with pytest.raises(CheckpointError, match=r"sinks of shape \[4\] is unexpected: LlamaForCausalLM has none"):
        load_model(tmp_path, "auto", CPU)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("gemma2", [((1, 3), None), ((0, 2), WINDOW)]),
        ("gemma3", [((5,), None), ((0, 1, 2, 3, 4), WINDOW)]),
        ("mistral", [((0, 1), WINDOW)]),
        ("llama", [((0, 1), None)]),
        ("smollm3-window", [((0, 3), None), ((1, 2), WINDOW)]),
    ],
)
def test_layers_of_one_span_are_one_group_of_the_layout(family: str, groups: list[Any], tmp_path: Path) -> None:
    assert [(group.layers, group.window) for group in load(tmp_path, VARIANTS[family]).layout.groups] == groups


def test_a_window_that_no_context_reaches_beyond_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, VARIANTS["mistral"])
    for window, expected in ((511, 511), (512, None), (4096, None)):
        configure(tmp_path, partial(dict.update, sliding_window=window))
        assert {layer.window for layer in read_config(tmp_path).layers} == {expected}


JUNK: tuple[Any, ...] = (None, True, 0, -1, 1, 3, 1.5, "x", [], [None], {}, {"rope_type": "yarn"}, 1e400, 10**400)


def places(raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, those of nested objects too."""
    for name, value in raw.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def put(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    inner = put(raw[path[0]], path[1:], value) if len(path) > 1 else value
    return raw | {path[0]: inner}


@pytest.mark.parametrize("name", [*PLAIN, "llama-yarn", "llama-dynamic", "phi4-mini", "qwen2-window", "smollm3-window"])
def test_a_wrong_value_of_any_field_is_served_or_refused_by_its_name(name: str) -> None:
    raw = make_config(VARIANTS[name]).to_dict() | {"architectures": [architecture_of(VARIANTS[name])]}
    messages = []
    for path in places(raw):
        for value in JUNK:
            fields = Fields(put(raw, path, value), "config.json")
            try:
                config = family_of(fields).parse(fields)
            except CheckpointError as error:
                messages.append(str(error))
                continue
            for rope in config.ropes:
                frequencies, scaling = inverse_frequencies(rope)
                assert frequencies.isfinite().all() and math.isfinite(scaling), (path, value)
            assert math.isfinite(config.attention_scale), (path, value)
            layer_groups(config.layers)
    assert len(messages) > 50
    assert all("config.json: " in message and " is " in message for message in messages)
