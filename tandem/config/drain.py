"""Settings of `tandem drain`."""

from __future__ import annotations

from pydantic import Field

from tandem.config.process import ProcessConfig


class DrainConfig(ProcessConfig):
    """`tandem drain`"""

    worker: str = Field(description="the worker: its host:port, or the beginning of its incarnation")
    router: str = Field(
        "127.0.0.1:8000", description="HTTP address of a router, which is asked who has that incarnation"
    )
