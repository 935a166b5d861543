"""Compiles grammars beside the worker: in processes that can be killed, within limits, and each text only once."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import xgrammar

from tandem.errors import BadRequest, Overloaded, Unavailable
from tandem.text.formats.held import TAG_START
from tandem.types import Grammar

log = logging.getLogger(__name__)

START_S = 120.0
"""Longest start of a compiling process: it loads the tokeniser."""
ORPHAN_LIMIT = 2.0
"""How many times the limit for a grammar a process takes before it ends itself: its worker may have been killed."""
IDLE = 1
"""Compiling processes that are kept for the next grammar."""
AGAIN_S = 60.0
"""A text whose compiling took too long is tried again after so long: the machine may have been busy."""
MAX_TEXTS = 128
"""Texts that may be compiled or wait for it at the same time. Common ones take some ten milliseconds each, and the last
waits for a few seconds; of texts that use up their time the last would wait for longer than any router does."""
FAILURE_BYTES = 1024
"""What a complaint counts in the cache."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class CompilerSettings:
    """Limits of one worker's grammars."""

    folder: str
    """With the model's tokeniser."""
    vocab_size: int
    stop_ids: tuple[int, ...]
    """What may follow a complete text; empty takes the tokeniser's."""
    seconds: float = 10.0
    """For one grammar."""
    memory_mib: int = 1024
    """For one grammar, beside the vocabulary."""
    again_s: float = AGAIN_S
    cache_mib: int = 256
    processes: int = 2
    """Grammars compiled at the same time."""
    any_whitespace: bool = False
    """Whether the model lays JSON out as it likes; else it is written on one line, and more of it is forced."""


@dataclass(slots=True)
class _Cached:
    """A compiled grammar, or the complaint about its text: a hostile text is not tried again and again."""

    grammar: xgrammar.CompiledGrammar | None
    complaint: str
    size: int
    field: str = ""
    """Which of the request's fields the complaint is about, where that is known."""
    until: float = math.inf
    """When it is forgotten; the event loop's time."""


@dataclass(slots=True)
class _Running:
    """One text that is compiled, or waits for its turn."""

    task: asyncio.Task[_Cached]
    waiters: int = 0
    """Requests that want it; it ends with the last of them."""


def refusal(grammar: Grammar, why: str, field: str = "") -> BadRequest:
    """What is said about a grammar that cannot be served."""
    if grammar.source.startswith(TAG_START):
        return BadRequest(f"{field or 'tools'} cannot be served: {why}", "tools")
    return BadRequest(f"the {grammar.kind.value} cannot be served: {why}", "response_format")


class GrammarCompiler:
    """All methods run on one event loop."""

    def __init__(self, settings: CompilerSettings) -> None:
        self._settings = settings
        self._cache: OrderedDict[Key, _Cached] = OrderedDict()
        self._bytes = 0
        self._running: dict[Key, _Running] = {}
        self._tasks: set[asyncio.Task[_Cached]] = set()
        """Of those that run, and those that were cancelled and have not ended yet."""
        self._slots = asyncio.Semaphore(settings.processes)
        self._idle: list[Process] = []
        self._processes: set[Process] = set()
        self._vocabulary: xgrammar.TokenizerInfo | None = None

    @property
    def vocabulary(self) -> xgrammar.TokenizerInfo:
        """What the grammars were compiled for; there once one was."""
        assert self._vocabulary is not None, "nothing was compiled yet"
        return self._vocabulary

    async def warm(self) -> None:
        """Starts a process before the first grammar comes. Raises Unavailable."""
        async with self._slots:
            self._keep(await self._start())

    async def compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        """Raises BadRequest naming what is wrong with the text, Unavailable when compiling is not possible here.

        Overloaded when too many other texts are being compiled.
        """
        key = (grammar.kind.value, grammar.source)
        cached = self._cache.get(key)
        if cached is not None and cached.until <= asyncio.get_running_loop().time():
            self._bytes -= self._cache.pop(key).size
            cached = None
        if cached is None:
            cached = await self._wait_for(key)
        else:
            self._cache.move_to_end(key)
        if cached.grammar is None:
            raise refusal(grammar, cached.complaint, cached.field)
        return cached.grammar

    async def _wait_for(self, key: Key) -> _Cached:
        """Raises Unavailable or Overloaded."""
        running = self._running.get(key) or self._begin(key)
        running.waiters += 1
        try:
            # A client that goes away takes nothing from those who asked for the same text.
            return await asyncio.shield(running.task)
        finally:
            running.waiters -= 1
            if running.waiters == 0 and not running.task.done():
                running.task.cancel()
                del self._running[key]  # at once: whoever asks next begins anew

    def _begin(self, key: Key) -> _Running:
        if len(self._running) >= MAX_TEXTS:
            count = len(self._running)
            raise Overloaded(f"{count} grammars are being compiled or wait for it, and no more may; try again later")
        running = self._running[key] = _Running(asyncio.create_task(self._compile(key)))
        self._tasks.add(running.task)
        running.task.add_done_callback(partial(self._ended, key))
        return running

    def _ended(self, key: Key, task: asyncio.Task[_Cached]) -> None:
        self._tasks.discard(task)
        running = self._running.get(key)
        if running is not None and running.task is task:
            del self._running[key]

    async def _compile(self, key: Key) -> _Cached:
        async with self._slots:
            process = self._kept() or await self._start()
            try:
                async with asyncio.timeout(self._settings.seconds):
                    done = await self._ask(process, key)
            except TimeoutError:
                self._kill(process)
                complaint = f"compiling it takes longer than {self._settings.seconds:g} s"
                until = asyncio.get_running_loop().time() + self._settings.again_s
                done = _Cached(None, complaint, FAILURE_BYTES, until=until)
            except EOFError:
                self._kill(process)
                # The machine may have ended it, and not the text.
                until = asyncio.get_running_loop().time() + self._settings.again_s
                done = _Cached(None, "compiling it ended the compiler", FAILURE_BYTES, until=until)
            except BaseException:
                self._kill(process)
                raise
            else:
                self._keep(process)
        self._remember(key, done)
        return done

    async def _ask(self, process: Process, key: Key) -> _Cached:
        """Raises EOFError when the process ends."""
        assert process.stdin is not None
        kind, source = key
        request = {"kind": kind, "source": source, "any_whitespace": self._settings.any_whitespace}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        try:
            await process.stdin.drain()
        except ConnectionError as error:
            raise EOFError from error
        head, body = await self._read(process)
        if "error" in head:
            return _Cached(None, str(head["error"]), FAILURE_BYTES, str(head.get("field", "")))
        assert self._vocabulary is not None
        compiled = await asyncio.to_thread(xgrammar.CompiledGrammar.deserialize_json, body.decode(), self._vocabulary)
        return _Cached(compiled, "", max(len(body), int(compiled.memory_size_bytes)))

    async def _read(self, process: Process) -> tuple[dict[str, object], bytes]:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise EOFError
        head = json.loads(line)
        try:
            return head, await process.stdout.readexactly(int(head.get("bytes", 0)))
        except asyncio.IncompleteReadError as error:
            raise EOFError from error

    async def _start(self) -> Process:
        settings = self._settings
        stops = ",".join(map(str, settings.stop_ids))
        seconds = settings.seconds * ORPHAN_LIMIT
        arguments = [settings.folder, str(settings.vocab_size), stops, str(settings.memory_mib), str(seconds)]
        self._processes = {process for process in self._processes if process.returncode is None}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tandem.engine.grammar.compiler_process", *arguments, stdin=PIPE, stdout=PIPE
        )
        self._processes.add(process)
        try:
            async with asyncio.timeout(START_S):
                _, body = await self._read(process)
            if self._vocabulary is None:
                self._vocabulary = await asyncio.to_thread(xgrammar.TokenizerInfo.deserialize_json, body.decode())
        except (TimeoutError, EOFError) as error:
            self._kill(process)
            raise Unavailable("grammars cannot be compiled here: the compiler did not start") from error
        except BaseException:
            self._kill(process)
            raise
        return process

    def _kept(self) -> Process | None:
        """A process that was kept and still lives: the machine may have ended it, which is no text's fault."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
            log.warning("an idle compiler of grammars was ended from outside: %d", process.returncode)
        return None

    def _keep(self, process: Process) -> None:
        if len(self._idle) < IDLE:
            self._idle.append(process)
        else:
            self._kill(process)

    def _kill(self, process: Process) -> None:
        if process.returncode is None:
            process.kill()

    def _remember(self, key: Key, done: _Cached) -> None:
        self._cache[key] = done
        self._bytes += done.size
        while self._bytes > self._settings.cache_mib << 20 and self._cache:
            self._bytes -= self._cache.popitem(last=False)[1].size

    async def close(self) -> None:
        """Ends every process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._processes:
            self._kill(process)
        await asyncio.gather(*(process.wait() for process in self._processes))
        self._idle.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError when the cache's size is not what it holds."""
        assert self._bytes == sum(cached.size for cached in self._cache.values())
