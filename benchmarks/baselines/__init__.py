"""How other routers choose workers, re-created from their documents and code as Tandem policies, to compare with.

They see what Tandem's own policies see: its prefix index, fed by the workers' events, and its load accounting. That is
more than some of them have by themselves (SGLang's tree never learns of evictions; llm-d's default index guesses), so
what is compared is the rule alone. None is part of the product.

`tandem replay TRACE --policy benchmarks.baselines:sglang`
"""

from __future__ import annotations

from benchmarks.baselines.dynamo import DynamoPolicy
from benchmarks.baselines.llmd import LlmdGatePolicy, LlmdScorersPolicy
from benchmarks.baselines.sglang import SglangEventsPolicy, SglangPolicy
from router.policies import Policy

sglang = SglangPolicy
sglang_events = SglangEventsPolicy
dynamo = DynamoPolicy
llmd = LlmdGatePolicy
llmd_scorers = LlmdScorersPolicy

BASELINES: dict[str, type[Policy]] = {
    "sglang": sglang,
    "sglang_events": sglang_events,
    "dynamo": dynamo,
    "llmd": llmd,
    "llmd_scorers": llmd_scorers,
}
