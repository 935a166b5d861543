"""From settings to an engine: loads the model and divides the memory into pages."""

from __future__ import annotations

import logging
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

from tandem.config import DecodeConfig, WorkerConfig
from tandem.device import resolve_device
from tandem.engine.engine import Engine
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.choose_gpu import UNMEASURED
from tandem.engine.kv_pool import KvPool
from tandem.engine.kv_size import CPU_MIB, MIB, kv_mib
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.policy import EngineConfig
from tandem.engine.runner import Runner
from tandem.engine.spec.base import Drafter
from tandem.engine.spec.draft_net import DraftNet, joined_fingerprint, load_draft_net
from tandem.engine.spec.model_drafter import ModelDrafter
from tandem.engine.spec.ngram import NgramDrafter
from tandem.engine.windows import most_pages, running_pages
from tandem.errors import ConfigError
from tandem.kv import DRAFT, KvLayout, LayerGroup

log = logging.getLogger(__name__)


def build_engine(config: WorkerConfig) -> tuple[Engine, LoadedModel]:
    """Loads `config.model`, a folder, and makes an engine for it.

    Raises CheckpointError when the model cannot be served, ConfigError when a setting does not fit it or this machine.
    """
    device = resolve_device(config.device)
    kernels = choose_kernels(config.kernels, device, config.max_running if config.cuda_graphs else 0)
    if config.overlap == "on" and device.type != "cpu":
        log.warning("overlap: %s", UNMEASURED)
    model = load_model(Path(config.model), config.dtype, device, kernels)
    net = load_draft_net(Path(config.draft_model), model) if config.draft_model else None
    if not config.pages:
        config = config.model_copy(update={"kv_mib": kv_mib(config, model.config, model.dtype, device)})
    layout = model.layout if net is None else model.layout.with_drafter(net.layout)
    pages = count_pages(config, layout)
    pool = KvPool(layout, pages, config.page_size, device)
    drafter = None if net is None else _drafter(net, model, pool, config.draft_branches)
    own, vocab = pool.part(model.layout, 0), model.config.vocab_size
    runner = Runner(model.module, own, vocab, device, kernels=model.kernels, observer=drafter)
    for group, count in zip(layout.groups, pages, strict=True):
        size, span = count * _page_bytes(config, group, layout) / MIB, group.window or "all"
        text = "KV memory of %d layers that see %s tokens: %d pages of %d tokens, %.1f MiB"
        log.info(text, len(group.layers), span, count, config.page_size, size)
    if net is not None:
        model = replace(model, fingerprint=joined_fingerprint(model.fingerprint, net.fingerprint))
    guesses = drafter or _reader(config)
    if config.overlap == "on" and guesses is not None:
        log.warning("steps do not overlap: a draft follows the tokens of the step before it")
    return Engine(runner, pool, engine_config(config), drafter=guesses), model


def _drafter(net: DraftNet, model: LoadedModel, pool: KvPool, branches: int) -> ModelDrafter:
    """A drafter over its groups of the pool, which are the last. Raises ConfigError where trees cannot be served."""
    first = len(model.layout.groups)
    part = pool.part(net.layout, first, DRAFT)
    attention = model.kernels.attention(part)
    if branches > 1 and not attention.trees:
        raise ConfigError(
            f"draft_branches is {branches}; it must be 1 with kernels {model.kernels.name}, which serve chains alone",
            "draft_branches",
        )
    return ModelDrafter(net, part, attention, first, branches)


def _reader(config: WorkerConfig) -> Drafter | None:
    """A drafter without a model. Prefill workers do not sample, so that there is nothing to guess."""
    if config.speculative != "ngram" or not isinstance(config, DecodeConfig):
        return None
    log.info("speculative decoding by what followed the same tokens before: up to %d ahead", config.draft_tokens)
    return NgramDrafter(config.prefix_cache)


def engine_config(config: WorkerConfig) -> EngineConfig:
    """The engine's share of a worker's settings."""
    return EngineConfig(
        max_batch_tokens=config.max_batch_tokens,
        tenant_share=config.tenant_cache_share,
        verify_share=config.verify_kv if config.prefix_cache else 0.0,
        max_running=config.max_running,
        ageing_s=config.ageing_s,
        prefix_cache=config.prefix_cache,
        inter_token_ms=config.inter_token_ms,
        overlap=config.overlap == "on",
        draft_tokens=config.draft_tokens,
        draft_adaptive=config.draft_adaptive,
    )


def count_pages(config: WorkerConfig, layout: KvLayout) -> tuple[int, ...]:
    """Pages of each layer group: `pages` for those that remember most, or as many as `kv_mib` holds of all.

    Those that remember most are the groups of full attention or, where there are none, that with the widest window.
    Any other group gets as many, too, but no more than all running sequences can hold at once (see
    `group_pages`). Raises ConfigError when memory is for less than a page.
    """
    if config.pages:
        return group_pages(config, layout, config.pages)
    memory = CPU_MIB if config.kv_mib is None else config.kv_mib
    budget = int(memory * MIB)
    most = range(budget // min(_page_bytes(config, group, layout) for group in layout.groups) + 1)
    pages = bisect_right(most, budget, key=lambda count: _total_bytes(config, layout, count)) - 1
    if pages < 1:
        needed = _total_bytes(config, layout, 1) / MIB
        raise ConfigError(f"kv_mib is {memory:g}; one page of this model needs {needed:.3g}", "kv_mib")
    return group_pages(config, layout, pages)


def group_pages(config: WorkerConfig, layout: KvLayout, pages: int) -> tuple[int, ...]:
    """Pages of each layer group when those that remember most have `pages`.

    A group with a window never is what keeps a sequence out: it has as many pages as the others, or enough for the
    windows of all that can run. What it saves goes to the others.
    """
    widest = max(group.window or 0 for group in layout.groups)
    full = any(group.window is None for group in layout.groups)
    running = engine_config(config).running_limit
    counts = []
    for group in layout.groups:
        each = running_pages(group, config.max_batch_tokens, config.page_size)
        one = most_pages(group, config.max_batch_tokens, config.page_size)
        if each is None or one is None or (not full and group.window == widest):
            counts.append(pages)
        else:
            counts.append(min(pages, max(each * running, one)))
    return tuple(counts)


def _total_bytes(config: WorkerConfig, layout: KvLayout, pages: int) -> int:
    counts = group_pages(config, layout, pages)
    return sum(count * _page_bytes(config, group, layout) for count, group in zip(counts, layout.groups, strict=True))


def _page_bytes(config: WorkerConfig, group: LayerGroup, layout: KvLayout) -> int:
    return config.page_size * layout.group_bytes(group)
