"""The same numbers under vLLM's names, for dashboards and endpoint pickers that know no others.

An alias is a family of ours under another name, with its samples summed over our labels; vLLM's own labels are
`model_name` and `engine`. Only what means the same is there: `docs/monitoring.md` has the table. The names are those of
vLLM's V1 engine, and of the protocol for model servers of the Gateway API Inference Extension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

PREFIX = "vllm:"


@dataclass(frozen=True, slots=True)
class Alias:
    """One of vLLM's families, made of one of ours."""

    name: str
    """vLLM's, without the prefix and `_total`."""
    source: str
    """Ours, without `_total`."""
    values: tuple[str, Mapping[str, str], str] | None = None
    """A label of ours that stays: (its name, our values -> vLLM's, vLLM's name); values not named are left out."""


def renamed(families: Iterable[Metric], aliases: Iterable[Alias], labels: Mapping[str, str]) -> list[Metric]:
    """The families under vLLM's names. labels: of every sample."""
    known = {family.name: family for family in families}
    return [_renamed(known[alias.source], alias, labels) for alias in aliases if alias.source in known]


def _renamed(family: Metric, alias: Alias, labels: Mapping[str, str]) -> Metric:
    made = Metric(PREFIX + alias.name, family.documentation, family.type)
    sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in family.samples:
        kept = dict(labels) | {name: value for name, value in sample.labels.items() if name == "le"}
        if alias.values is not None:
            ours, values, theirs = alias.values
            if sample.labels[ours] not in values:
                continue
            kept[theirs] = values[sample.labels[ours]]
        if not sample.name.endswith("_created"):
            sums[made.name + sample.name.removeprefix(family.name), tuple(kept.items())] += sample.value
    for (name, kept_labels), value in sums.items():
        made.add_sample(name, dict(kept_labels), value)
    return made


@dataclass(frozen=True, slots=True)
class Load:
    """What vLLM has gauges for, at one moment."""

    running: int
    """Sequences in a batch."""
    waiting: int
    """Requests received and not yet in one."""
    used_pages: int
    """KV pages that running sequences hold; cached ones that can be reclaimed are free, as in vLLM."""
    pages: int
    page_size: int
    """Tokens in a page."""
    kv_dtype: str
    prefix_cache: bool


def gauges(load: Load, labels: Mapping[str, str]) -> list[Metric]:
    """The three gauges that an endpoint picker needs, and the cache's configuration."""
    found: list[Metric] = []
    for name, text, value in (
        ("num_requests_running", "Sequences in the batch", float(load.running)),
        ("num_requests_waiting", "Requests waiting to be in it", float(load.waiting)),
        ("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1", load.used_pages / max(load.pages, 1)),
    ):
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=list(labels))
        gauge.add_metric(list(labels.values()), value)
        found.append(gauge)
    about = {
        **labels,
        "block_size": str(load.page_size),
        "num_gpu_blocks": str(load.pages),
        "cache_dtype": load.kv_dtype,
        "enable_prefix_caching": str(load.prefix_cache),
    }
    config = GaugeMetricFamily(PREFIX + "cache_config_info", "The KV cache", labels=list(about))
    config.add_metric(list(about.values()), 1)
    return [*found, config]


def text_page(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format of some families."""
    registry = CollectorRegistry()
    registry.register(_Families(tuple(families)))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: tuple[Metric, ...]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return ()
