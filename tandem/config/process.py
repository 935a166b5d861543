"""Settings of every process, and where they come from: flag, environment (`TANDEM_*`), YAML file, default."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from tandem.config.environment import config_file, standard_otlp_endpoint
from tandem.config.fields import METRICS_ALIAS_HELP, OPEN_GRPC, HttpUrl, MetricsAlias, PemFile, Secret, http_url
from tandem.errors import ConfigError
from tandem.ports import is_loopback

OTLP_EXPORTER = "opentelemetry-exporter-otlp-proto-http"


class Settings(BaseSettings):
    """What every command has."""

    model_config = SettingsConfigDict(env_prefix="TANDEM_", frozen=True, extra="forbid", hide_input_in_errors=True)

    config: Path | None = Field(None, description="YAML file with any of these settings")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="one line of text or one JSON object per record")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flag, environment, YAML file, the environment that all tools share: the first that has a setting counts."""
        path = getattr(init_settings, "init_kwargs", {}).get("config") or config_file()
        files = (yaml_source(settings_cls, Path(path)),) if path else ()
        return (init_settings, env_settings, *files, InitSettingsSource(settings_cls, shared_by_tools(settings_cls)))


def shared_by_tools(settings_cls: type[BaseSettings]) -> dict[str, Any]:
    """Settings with variables that are not Tandem's own. Platforms set these for all: what cannot be used is none."""
    endpoint = standard_otlp_endpoint()
    usable = endpoint and "otlp_endpoint" in settings_cls.model_fields and not unusable(endpoint)
    return {"otlp_endpoint": endpoint} if usable else {}


def unusable(endpoint: str) -> str:
    """Why no traces can be sent there, without the address, which may hold a password; empty where they can."""
    try:
        http_url(endpoint)
    except ValueError as error:
        return str(error)
    return "" if installed(OTLP_EXPORTER) else "needs `pip install 'tandem-serve[otel]'`"


def yaml_source(settings_cls: type[BaseSettings], path: Path) -> YamlConfigSettingsSource:
    """The library takes a missing file for an empty one; here it is an error like any other wrong setting."""
    if not path.is_file():
        raise ConfigError(f"--config is {path}; there is no such file", "config")
    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=path)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config is {path}; it must be a YAML mapping of settings: {reason}", "config") from None


class TracedSettings(Settings):
    """Settings of commands whose processes serve requests: where the traces of these go."""

    otlp_endpoint: HttpUrl = Field(
        "",
        description="URL of an OTLP/HTTP collector that gets the traces of requests; empty sends none; default: "
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    trace_share: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="share of requests that are traced, where the client did not decide"
    )
    trace_prompts: bool = Field(False, description="put the prompts of traced requests into their traces")

    @model_validator(mode="after")
    def _traceable(self) -> TracedSettings:
        if self.otlp_endpoint and (reason := unusable(self.otlp_endpoint)):
            raise ValueError(f"--otlp-endpoint: {reason}")
        return self

    def untraced(self) -> str:
        """Why nothing is traced though the variable that all tools share names a collector; else empty."""
        endpoint = standard_otlp_endpoint()
        if not endpoint or "otlp_endpoint" in self.model_fields_set:
            return ""
        return f"nothing is traced: OTEL_EXPORTER_OTLP_ENDPOINT {unusable(endpoint)}"


def installed(distribution: str) -> bool:
    """Whether a package is there; nothing is imported."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


class ProcessConfig(Settings):
    """Settings of every command that speaks gRPC: by what it knows the others."""

    token: Secret | None = Field(None, description="secret that all processes of a cluster share")
    metrics_token: Secret | None = Field(None, description="secret that readers of metrics show")
    metrics_alias: MetricsAlias = Field("none", description=METRICS_ALIAS_HELP)
    tls_cert: PemFile | None = Field(None, description="PEM file with this process's certificate, for gRPC")
    tls_key: PemFile | None = Field(None, description="PEM file with its key")
    tls_ca: PemFile | None = Field(None, description="PEM file with who must have signed the others' certificates")
    tls_name: str = Field("", description="name in the others' certificates; default: the address they are called at")

    @model_validator(mode="after")
    def _whole_tls(self) -> ProcessConfig:
        if len({self.tls_cert is None, self.tls_key is None, self.tls_ca is None}) > 1:
            raise ValueError("--tls-cert, --tls-key and --tls-ca are needed together")
        return self

    def check_grpc(self, setting: str, host: str) -> None:
        """Refuses ports that others reach and nothing guards. setting: the flag, for the message."""
        if not is_loopback(host) and self.token is None and self.tls_cert is None:
            raise ValueError(f"{setting} is {host}; {OPEN_GRPC}")


def dump(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values, for logs and banners."""
    return settings.model_dump(mode="json")
