"""How other routers choose workers, re-created from their documents and code as Tandem policies, to compare with.

They see what Tandem's own policies see: its prefix index, fed by the workers' events, and its load accounting. That is
more than some of them have by themselves (SGLang's tree never learns of evictions; llm-d's default index guesses), so
what is compared is the rule alone. None is part of the product.

`tandem replay TRACE --policy benchmarks.baselines:sglang`
"""

from benchmarks.baselines.dynamo import DynamoPolicy as dynamo
from benchmarks.baselines.llmd import LlmdGatePolicy as llmd
from benchmarks.baselines.llmd import LlmdScorersPolicy as llmd_scorers
from benchmarks.baselines.sglang import SglangEventsPolicy as sglang_events
from benchmarks.baselines.sglang import SglangPolicy as sglang

__all__ = ["dynamo", "llmd", "llmd_scorers", "sglang", "sglang_events"]
