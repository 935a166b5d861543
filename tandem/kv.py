"""What KV is: its layout, its spans, and the block hashes by which the cluster names it. Standard library only."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

BLOCK_TOKENS = 64
"""Tokens in a block: a cluster constant, a multiple of every page size."""

BlockHash = bytes
"""16 bytes, chained: equal hashes mean equal tokens after an equal prefix under an equal root."""

NO_PARENT = bytes(16)
"""Stands before the first block: a parent of fixed length cannot be taken for content, or content for a parent."""

DRAFT = "draft_"
"""What the names of a drafter's planes begin with."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor kind of the KV. A token's share of it in one layer is `heads * head_dim` elements."""

    name: str
    heads: int
    head_dim: int
    dtype: str

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with the same attention span and the same planes; `window` is None for full attention."""

    layers: tuple[int, ...]
    window: int | None = None
    """Position p sees tokens `(p - window, p]`."""
    planes: tuple[str, ...] = ()
    """Names of the planes that these layers have; empty: all. A drafter's layers have planes of their own."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1")

    def seen_from(self, position: int) -> int:
        """The first token that `position`, or a later one, sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def moved_from(self, total: int) -> int:
        """The first token that a hand-over of `[0, total)` moves: whole blocks of what the last block's end sees.

        The next position alone would see from `seen_from(total)`. Beginning at a block's border fills whole pages of
        any size; and a receiver that cached whole pages only, so fewer than `total` tokens, can go on from these.
        """
        return self.seen_from(total // BLOCK_TOKENS * BLOCK_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The canonical order of KV on the wire: `[plane][layer][token][head][dim]`, the same for every page size.

    Layers with a window move fewer tokens than others; see `shares`. A plane lies there for the layers that have it.
    """

    planes: tuple[Plane, ...]
    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        layers = [layer for group in self.groups for layer in group.layers]
        if sorted(layers) != list(range(len(layers))):
            raise ValueError(f"layer groups must cover layers 0..{len(layers) - 1} once each")
        unknown = {name for group in self.groups for name in group.planes} - {plane.name for plane in self.planes}
        if unknown:
            raise ValueError(f"layer groups name planes {', '.join(sorted(unknown))}, which the layout does not have")

    @property
    def num_layers(self) -> int:
        """Layers over all groups."""
        return sum(len(group.layers) for group in self.groups)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all planes and layers."""
        return sum(self.group_bytes(group) for group in self.groups)

    def planes_of(self, group: LayerGroup) -> tuple[Plane, ...]:
        """The planes that a group's layers have."""
        return tuple(plane for plane in self.planes if not group.planes or plane.name in group.planes)

    def group_bytes(self, group: LayerGroup) -> int:
        """Bytes of one token over a group's layers and their planes."""
        return len(group.layers) * sum(plane.token_bytes for plane in self.planes_of(group))

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """Each layer's group, as a number."""
        found = {layer: number for number, group in enumerate(self.groups) for layer in group.layers}
        return tuple(found[layer] for layer in range(len(found)))

    def moved_from(self, total: int) -> int:
        """The first token of which a hand-over of `[0, total)` moves anything."""
        return min(group.moved_from(total) for group in self.groups)

    def shares(self, span: Span, total: int) -> tuple[Span, ...]:
        """Per group, the tokens of a span that are moved in a hand-over of `[0, total)`: all, its end, or none.

        On the wire a layer has as many tokens as its group's share.
        """
        starts = (min(max(span.start, group.moved_from(total)), span.end) for group in self.groups)
        return tuple(Span(start, span.end - start) for start in starts)

    def span_bytes(self, span: Span, total: int) -> int:
        """Bytes of a span in a hand-over of `[0, total)`."""
        shares = self.shares(span, total)
        return sum(self.group_bytes(group) * share.count for group, share in zip(self.groups, shares, strict=True))

    def with_drafter(self, drafter: KvLayout) -> KvLayout:
        """The same, and behind it the layers and groups of a drafter, whose planes get names of their own."""
        names = tuple(plane.name for plane in self.planes)
        own = tuple(replace(plane, name=DRAFT + plane.name) for plane in drafter.planes)
        groups = [replace(group, planes=group.planes or names) for group in self.groups]
        for group in drafter.groups:
            layers = tuple(self.num_layers + layer for layer in group.layers)
            kept = tuple(DRAFT + plane.name for plane in drafter.planes_of(group))
            groups.append(replace(group, layers=layers, planes=kept))
        return KvLayout(self.planes + own, tuple(groups))

    @property
    def has_drafter(self) -> bool:
        """Whether a drafter's KV is cached and handed over with the model's."""
        return any(plane.name.startswith(DRAFT) for plane in self.planes)

    def digest(self) -> str:
        """Hex digest by which two workers check that they mean the same bytes."""
        return hashlib.blake2b(repr(self).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[start, start + count)` of one request's prompt."""

    start: int
    count: int

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class HashRoot:
    """What must be equal before any block can be: the root of the hash chain."""

    cluster_key: str
    model_fingerprint: str
    kv_dtype: str
    adapter: str = ""
    salt: str = ""

    def digest(self) -> bytes:
        """32-byte key for the chain. Fields are length-prefixed, so that no two roots collide by concatenation."""
        state = hashlib.blake2b(digest_size=32, person=b"tandem-root-v1")
        for part in (self.cluster_key, self.model_fingerprint, self.kv_dtype, self.adapter, self.salt):
            data = part.encode()
            state.update(struct.pack("<I", len(data)))
            state.update(data)
        return state.digest()


def block_hashes(
    root: bytes, tokens: Sequence[int], contents: Sequence[bytes] = (), parent: BlockHash = b""
) -> list[BlockHash]:
    """Hashes of the full blocks of `tokens`; a trailing partial block has none.

    root: `HashRoot.digest()`. contents: per block, the hash of non-text content in it (images); empty means none.
    parent: hash of the block before `tokens`, for a chain that goes on; empty at its start.
    Keyed BLAKE2b-128 over (parent, token ids as little-endian u32, content).
    """
    return list(iter_block_hashes(root, tokens, contents, parent))


def iter_block_hashes(
    root: bytes, tokens: Sequence[int], contents: Sequence[bytes] = (), parent: BlockHash = b""
) -> Iterator[BlockHash]:
    """As `block_hashes`, one at a time, for callers that stop early."""
    pack = struct.Struct(f"<{BLOCK_TOKENS}I").pack
    for index in range(len(tokens) // BLOCK_TOKENS):
        block = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        content = contents[index] if contents else b""
        parent = hashlib.blake2b((parent or NO_PARENT) + pack(*block) + content, digest_size=16, key=root).digest()
        yield parent
