"""Questions and answers about Tandem itself, in the words of its architecture page. Data only."""

from __future__ import annotations

# term, questions besides the usual "What is a ...?" forms, answer
TERMS: tuple[tuple[str, str], ...] = (
    (
        "Tandem",
        "Tandem is a serving system for large language models in which prefill and decode run on different workers.",
    ),
    (
        "the router",
        "The router is the HTTP front door of Tandem. It tokenises, decides which workers serve a request, "
        "dispatches it, detokenises and streams the answer.",
    ),
    (
        "a prefill worker",
        "A prefill worker computes the KV of prompt tokens that are not cached and pushes it to a "
        "decode worker. It never samples.",
    ),
    (
        "a decode worker",
        "A decode worker owns a request from admission to its last token. It runs continuous batching "
        "and can also prefill locally.",
    ),
    ("a rank", "A rank is one process of a worker's parallel group. Rank 0 schedules and speaks gRPC."),
    ("a page", "A page is a fixed number of tokens of KV on one rank. It is the unit of allocation inside a worker."),
    (
        "a block",
        "A block is 64 tokens, a cluster constant. It is the only unit of hashing, events and the prefix index.",
    ),
    ("a block hash", "A block hash is a chained keyed BLAKE2b hash over the parent's hash and the block's token ids."),
    ("a plane", "A plane is one kind of tensor in the KV, such as K or V."),
    ("a layer group", "A layer group is a set of layers with the same attention span."),
    (
        "the prefix cache",
        "The prefix cache is a worker's own exact radix tree over its tokens. It matches down to one token.",
    ),
    (
        "the prefix index",
        "The prefix index is the router's approximate radix tree over the block hashes of all workers.",
    ),
    (
        "a plan",
        "A plan is the router's decision: a decode worker, a prefill worker or none, ranked alternatives for "
        "both, and why.",
    ),
    (
        "a ticket",
        "A ticket names one KV hand-over: the request, the attempt, both incarnations, the layout and the deadlines.",
    ),
    (
        "a landing slab",
        "A landing slab is memory that a decode worker registers for one peer. It is the only memory a peer can write.",
    ),
    (
        "a grant",
        "A grant is a byte range of a landing slab lent to a ticket. It is the credit a sender may write against.",
    ),
    ("a span", "A span is a contiguous run of tokens whose KV is pushed at once, in a canonical order."),
    (
        "an incarnation",
        "An incarnation is a 128-bit id that a worker draws at start. Every message and lease carries it.",
    ),
    ("a lease", "A lease is the right to hold something of another process. It is renewed by heartbeat."),
    (
        "the KV cache",
        "The KV cache holds the keys and values of tokens already processed, so that they are not computed again.",
    ),
    ("prefill", "Prefill is the phase that computes the KV of the prompt's tokens."),
    ("decode", "Decode is the phase that produces the answer one token at a time."),
    ("disaggregated serving", "Disaggregated serving means that prefill and decode run on different workers."),
    ("continuous batching", "Continuous batching means that requests join and leave the running batch at every step."),
    ("NIXL", "NIXL is the transfer library that moves KV between workers, over RDMA, shared memory or TCP."),
)

# in-distribution phrasings, held-out phrasing, answer
QUESTIONS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("What does the router do?", "What is the job of the router?", "What is the router for?"),
        "What does the router in Tandem do?",
        "The router is the HTTP front door of Tandem. It tokenises, decides which workers serve a request, dispatches "
        "it, detokenises and streams the answer.",
    ),
    (
        ("What does a prefill worker do?", "What is the job of a prefill worker?", "What do prefill workers do?"),
        "What does a prefill worker in Tandem do?",
        "A prefill worker computes the KV of prompt tokens that are not cached and pushes it to a decode worker. It never "
        "samples.",
    ),
    (
        ("What does a decode worker do?", "What is the job of a decode worker?", "What do decode workers do?"),
        "What does a decode worker in Tandem do?",
        "A decode worker owns a request from admission to its last token. It runs continuous batching and can also "
        "prefill locally.",
    ),
    (
        (
            "How is KV moved?",
            "How is the KV moved between workers?",
            "How does KV travel from prefill to decode?",
            "How does KV get to the decode worker?",
        ),
        "How is KV sent from prefill to decode?",
        "The prefill worker pushes spans of KV over NIXL into a landing slab of the decode worker, which copies them into "
        "its pool pages.",
    ),
    (
        ("How does Tandem work?", "How does it work?", "How does Tandem serve a request?"),
        "How does Tandem answer a request?",
        "The router picks the workers, a prefill worker computes the KV of the prompt and pushes it to a decode worker, "
        "and the decode worker generates the answer.",
    ),
    (
        (
            "Why does Tandem separate prefill and decode?",
            "Why are prefill and decode separated?",
            "Why do prefill and decode run on different workers?",
        ),
        "Why does Tandem split prefill and decode?",
        "Prefill needs compute and decode needs memory bandwidth. On different workers they do not slow each other down.",
    ),
    (
        ("Who samples the tokens?", "Where are tokens sampled?", "Which worker samples tokens?"),
        "Where does sampling happen?",
        "Tokens are sampled only on the decode worker.",
    ),
    (
        ("How does the router choose a worker?", "How does the router decide?", "How does routing work in Tandem?"),
        "How does the router pick a worker?",
        "The router estimates the cost in milliseconds of each candidate from load and cached prefixes, and takes the "
        "smallest.",
    ),
    (
        ("Can a decode worker prefill?", "Can a decode worker prefill locally?"),
        "Is a decode worker able to prefill?",
        "Yes. A decode worker prefills locally when that is measured to be faster.",
    ),
    (
        ("Does a prefill worker sample?", "Can a prefill worker sample tokens?"),
        "Does the prefill worker sample tokens?",
        "No. A prefill worker never samples.",
    ),
    (
        ("What happens when a decode worker dies?", "What happens if a decode worker crashes?"),
        "What happens if a decode worker dies?",
        "The prompt and the tokens generated so far are replayed on another worker, so the request goes on.",
    ),
    (
        ("What API does Tandem speak?", "Which API does Tandem offer?", "How do I talk to Tandem?"),
        "Which API does Tandem speak?",
        "Tandem speaks the OpenAI API over HTTP, with streaming.",
    ),
    (
        ("How do I start Tandem?", "How can I start Tandem?", "How do I run Tandem?"),
        "How can I run Tandem?",
        "Run: tandem up MODEL --prefill 2 --decode 2",
    ),
    (
        ("Can a peer write into the KV pool?", "Is the KV pool registered for remote writes?"),
        "Can a peer write to the KV pool?",
        "No. A peer can write only into its landing slab, never into the KV pool.",
    ),
    (
        ("What happens on the next turn of a chat?", "What happens on the next turn of a conversation?"),
        "What happens on the next chat turn?",
        "The decode worker usually has the whole history in its cache, so nothing is recomputed or moved.",
    ),
    (
        ("What is reused on the next turn?", "What does the cache save?"),
        "What gets reused on the next turn?",
        "The KV of the prompt and of the generated tokens is reused, except for the last sampled token, which has no KV "
        "yet.",
    ),
)
