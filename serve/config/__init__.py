"""ServerConfig: everything an operator chooses, built once at the edge and passed down in parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from serve.config.errors import OptionError, flag, naming
from serve.config.groups import (
    Clients,
    Group,
    Listening,
    Memory,
    Model,
    Observing,
    Reading,
    Requests,
    Running,
    Scheduling,
    Security,
)
from serve.config.ranges import check_ranges

__all__ = ["GROUPS", "OptionError", "ServerConfig", "flag", "naming"]

CPU_BUCKETS = (8, 16, 32, 64)
ACCELERATOR_BUCKETS = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512)


@dataclass(frozen=True, kw_only=True)
class ServerConfig(
    Model,
    Listening,
    Security,
    Scheduling,
    Memory,
    Clients,
    Reading,
    Requests,
    Observing,
    Running,
):
    """Options of `taper-serve`. Raises OptionError for what cannot work."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for group in GROUPS.values():
            group.check(self)

    def for_platform(self, platform: str) -> ServerConfig:
        """With dtype, page size and buckets filled in for a JAX platform, "cpu" or another."""
        accelerated = platform != "cpu"
        buckets = ACCELERATOR_BUCKETS if accelerated else CPU_BUCKETS
        return replace(
            self,
            dtype=self.dtype or ("bfloat16" if accelerated else "float32"),
            page_size=self.page_size or (64 if accelerated else 16),
            buckets=self.buckets or buckets,
        )


GROUPS: dict[str, type[Group]] = {group.__name__.lower(): group for group in ServerConfig.__bases__}
"""Of its options: name and class of each group, in the order of --help."""
