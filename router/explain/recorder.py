"""The stories of recent requests: bounded by number, by bytes and by age; each is shown only to its own tenant."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from router.explain.story import AddressOf, Copy, Story, explanation
from tandem.cluster import Incarnation, Plan
from tandem.types import GenerateRequest


class Recorder:
    """Remembers requests from their receipt on; the oldest are forgotten first.

    max_stories: 0 remembers nothing. max_bytes: by `Story.bytes`. max_age_s: seconds since a request was received.
    clock: seconds, monotonic.
    """

    def __init__(self, max_stories: int, max_bytes: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._max_stories = max_stories
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._weights: dict[str, int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        """Stories remembered."""
        return len(self._stories)

    @property
    def weight(self) -> int:
        """Bytes that they take up, about."""
        return self._bytes

    def begin(self, request: GenerateRequest) -> Story:
        """The story of a request just received; it may be written to whether or not it is still remembered."""
        story = Story.of(request, time.time(), self._clock())
        self._drop(story.request_id)
        self._stories[story.request_id] = story
        self._weigh(story)
        return story

    def planned(self, story: Story, plan: Plan, matches: Mapping[Incarnation, int]) -> None:
        """Adds a plan to a story."""
        story.planned(plan, matches, self._clock())
        if self._stories.get(story.request_id) is story:
            self._weigh(story)

    def copying(self, story: Story, copy: Copy) -> None:
        """A prefix of its prompt is being copied; what becomes of it is written to `copy`."""
        story.copies.append(copy)
        if self._stories.get(story.request_id) is story:
            self._weigh(story)

    def link(self, request_ids: Sequence[str]) -> None:
        """These requests came as one: the first one's story names the others."""
        story = self._stories.get(request_ids[0])
        if story is not None:
            story.siblings = tuple(request_ids[1:])

    def find(self, request_id: str, tenant: str | None) -> list[Story]:
        """A request's story and those of what came with it; empty when there is none that `tenant` may see.

        tenant: None sees all.
        """
        self._bound()
        first = self._seen(request_id, tenant)
        if first is None:
            return []
        others = (self._seen(sibling, tenant) for sibling in first.siblings)
        return [first, *(story for story in others if story is not None)]

    def told(self, request_id: str, tenant: str | None, address_of: AddressOf) -> bytes | None:
        """What `find` finds as JSON; None when that is nothing. Addresses are for those who see all."""
        found = self.find(request_id, tenant)
        if not found:
            return None
        said = [explanation(story, address_of if tenant is None else None) for story in found]
        whole = {"object": "tandem.explanation", "id": request_id, "requests": said}
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()

    def _seen(self, request_id: str, tenant: str | None) -> Story | None:
        story = self._stories.get(request_id)
        return story if story is not None and tenant in (None, story.tenant) else None

    def _weigh(self, story: Story) -> None:
        self._bytes += story.bytes - self._weights.get(story.request_id, 0)
        self._weights[story.request_id] = story.bytes
        self._bound()

    def _drop(self, request_id: str) -> None:
        if self._stories.pop(request_id, None) is not None:
            self._bytes -= self._weights.pop(request_id)

    def _bound(self) -> None:
        horizon = self._clock() - self._max_age_s
        while self._stories:
            oldest = next(iter(self._stories.values()))
            full = len(self._stories) > self._max_stories or self._bytes > self._max_bytes
            if not full and oldest.started_s >= horizon:
                return
            self._drop(oldest.request_id)

    def check_integrity(self) -> None:
        """Raises AssertionError if a bound or a sum is wrong; for tests."""
        assert self._stories.keys() == self._weights.keys()
        assert self._bytes == sum(self._weights.values())
        assert all(story.bytes == self._weights[story.request_id] for story in self._stories.values())
        assert len(self._stories) <= self._max_stories
        assert self._bytes <= self._max_bytes
