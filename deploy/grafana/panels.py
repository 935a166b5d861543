"""What all dashboards are made of: panels with unit and description, and variables for source, model and instance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

ROUTER = '{component="router",model=~"$model",instance=~"$instance"}'
"""Selects a router's series; `of` adds matchers to it."""
PREFILL = '{component="prefill",model=~"$model",instance=~"$instance"}'
DECODE = '{component="decode",model=~"$model",instance=~"$instance"}'
WORKERS = '{component=~"prefill|decode",model=~"$model",instance=~"$instance"}'
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
HEIGHT = 8


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and what its series are called."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. unit: as Grafana calls it: s, percentunit, short, reqps, bytes, Bps."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    top: float | None = None
    """End of the axis, where that is known."""
    single: bool = False
    """Shows the last value only."""


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and its panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. components: whose instances its variable `instance` offers, as a regular expression."""

    uid: str
    title: str
    description: str
    components: str
    rows: tuple[Row, ...]


def of(selector: str, *matchers: str) -> str:
    """A selector with further matchers."""
    return ",".join([selector[:-1], *matchers]) + "}"


def rate(metric: str, selector: str, by: str = "") -> str:
    """Per second, summed; by: labels that stay."""
    return f"sum{_by(by)} (rate({metric}{selector}[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    """One sum of rates by another."""
    return f"{part} / {whole}"


def quantiles(metric: str, selector: str, shares: Sequence[float] = (0.5, 0.9, 0.99)) -> tuple[Query, ...]:
    """Of a histogram, over all that is selected."""
    return tuple(
        Query(f"histogram_quantile({share}, {rate(f'{metric}_bucket', selector, 'le')})", f"p{share * 100:g}")
        for share in shares
    )


def mean(metric: str, selector: str, by: str = "") -> str:
    """Of a histogram."""
    return ratio(rate(f"{metric}_sum", selector, by), rate(f"{metric}_count", selector, by))


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def made(board: Board) -> Dashboard:
    """The dashboard as Grafana's own model of it."""
    builder = (
        build.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["tandem"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            build.DashboardLink("Tandem")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["tandem"])
            .as_dropdown(True)
            .keep_time(True)
        )
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("model", "Model", 'label_values(up{component="router"}, model)'))
        .with_variable(
            _variable(
                "instance", "Instance", f'label_values(up{{component=~"{board.components}",model=~"$model"}}, instance)'
            )
        )
    )
    for row in board.rows:
        builder = builder.with_row(build.Row(row.title))
        for panel in row.panels:
            builder = builder.with_panel(_graph(panel))
    return builder.build()


def _variable(name: str, label: str, query: str) -> build.QueryVariable:
    """All by default; also selects series that lack the label."""
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _graph(panel: Panel) -> stat.Panel | timeseries.Panel:
    graph: stat.Panel | timeseries.Panel
    if panel.single:
        graph = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        table = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        graph = timeseries.Panel().fill_opacity(8).line_width(1).legend(table.show_legend(True))
        graph = graph.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    graph = graph.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE).min(0)
    graph = graph.height(HEIGHT).span(panel.width)
    if panel.top is not None:
        graph = graph.max(panel.top)
    for at, query in enumerate(panel.queries):
        target = Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + at)).datasource(SOURCE)
        graph = graph.with_target(target.range())
    return graph
