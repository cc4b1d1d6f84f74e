"""Continuous batching: requests join and leave one running batch between two tokens.

Axis letters: b rows of the batch, t time, v vocabulary. The states of all rows lie in one MambaState. The model gives a
new one at every step, so rows that leave or join cost one more copy at the steps where that happens, and nothing else.
"""

import threading
import traceback
from collections import Counter, deque
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from anymamba.errors import AnymambaError
from anymamba.generate.batch import Batch, Job, batch_of, joined
from anymamba.generate.checks import (
    check_cache,
    check_rules,
    checked_prompts,
    checked_state,
    require_positive,
    require_vocabulary,
)
from anymamba.generate.decode import Decoder
from anymamba.generate.prefix import PrefixCache
from anymamba.generate.requests import Counters, Handle, QueueFull, Request
from anymamba.generate.rows import Row, Rules, lengths_of, read
from anymamba.generate.sampling import Drawn, choose_each, row_generators


class Engine:
    """Serves many requests with one model: first come, first served, each with the tokens it would get alone.

    Some thread steps it: `step`, `run`, or whoever waits for a handle. All methods may be called from any thread.

    model: a MambaLM, or anything that is called and answers like one and has `device` and `config.vocab_size`.
    max_batch: completions that are written at once. max_queue: requests that may wait.
    prefill_chunk: tokens of one prompt that one step reads at most; max_prefill_tokens: those of all prompts together.
    With the batch's next token that is all the work of a step, so a long prompt does not hold up the others.
    cache: a `PrefixCache` of this model: a prompt is read from the longest beginning that it knows, and leaves its own
    there; a request with a state of its own is not looked up. It counts the hits.

    Raises AnymambaError for limits below 1, a cache of another model, and a model that predicts no next token.
    """

    def __init__(self, model: torch.nn.Module, *, max_batch: int = 32, max_queue: int = 256, prefill_chunk: int = 512,
                 max_prefill_tokens: int = 1024, cache: PrefixCache | None = None):  # fmt: skip
        require_positive(max_batch=max_batch, max_queue=max_queue, prefill_chunk=prefill_chunk,
                         max_prefill_tokens=max_prefill_tokens)  # fmt: skip
        require_vocabulary("Engine", model)
        check_cache(model, cache)
        self._model, self._max_batch, self._max_queue, self._cache = model, max_batch, max_queue, cache
        self._prefill_chunk, self._max_prefill_tokens = prefill_chunk, max_prefill_tokens
        self._stepping = threading.Lock()  # held through a step
        self._changed = threading.Condition()  # held for what other threads see, never while the model works
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._batch, self._decoder = Batch(), Decoder(model)
        self._counts: Counter[str] = Counter()
        self._runs, self._closed = 0, False

    # ---- for those who ask ----

    def submit(self, request: Request, *, timeout: float | None = 0.0) -> Handle:
        """Put a request into the queue; if that is full, wait `timeout` seconds (None: for ever) for a step elsewhere.

        Raises QueueFull, and AnymambaError for what cannot be meant and once the engine is closed.
        """
        job = self._job(request)
        with self._changed:
            room = self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._max_queue, timeout)
            if self._closed:
                raise AnymambaError("engine: it is closed and takes no requests; make a new one")
            if not room:
                full = f"engine: {len(self._waiting)} requests wait, and max_queue={self._max_queue}"
                raise QueueFull(f"{full}; try again later, or wait longer than timeout={timeout} s")
            self._waiting.append(job)
            self._counts["submitted"] += 1
            self._changed.notify_all()
        return job.handle

    def counters(self) -> Counters:
        """A snapshot, consistent in itself."""
        with self._changed:
            running = len({id(handle) for handle in self._batch.handles if not handle.done})
            stages = {"waiting": len(self._waiting), "reading": len(self._reading), "running": running}
            names = ("submitted", "finished", "cancelled", "failed", "prefill_tokens", "generated_tokens", "steps")
            return Counters(slots=self._slots(), **stages, **{name: self._counts[name] for name in names})

    def wait_until(self, ready) -> None:
        """Wait until `ready()`. Where no other thread is in `run`, the one that waits steps."""
        while True:
            with self._changed:
                if ready():
                    return
                if self._runs:
                    self._changed.wait()
                    continue
            self.step()

    # ---- for those who serve ----

    def run(self, forever: bool = False) -> None:
        """Step until nothing is left to do; with `forever` wait for more, until `close`."""
        with self._changed:
            self._runs += 1
        try:
            while self.step() or (forever and not self._closed):
                if forever:
                    with self._changed:
                        self._changed.wait_for(lambda: self._closed or self._busy())
        finally:
            with self._changed:
                self._runs -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Cancel everything and take no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """Admit what there is room for, read a bounded piece of the new prompts, write one token of every completion.

        Errors of the model end the requests that it was called for. Returns whether there is more to do.
        """
        with self._stepping:
            with self._changed:
                self._counts["steps"] += self._busy()
                self._drop_cancelled()
                while self._waiting and self._slots() + len(self._waiting[0].rows) <= self._max_batch:
                    self._reading.append(self._waiting.popleft())
                self._changed.notify_all()  # the queue has room
            self._prefill()
            self._decode()
            with self._changed:
                if not self._batch.going():
                    self._batch, self._decoder = Batch(), Decoder(self._model)  # an idle engine holds no states
                self._changed.notify_all()
                return self._busy()

    # ---- one step ----

    def _drop_cancelled(self):
        for jobs in (self._waiting, self._reading):
            for job in [job for job in jobs if job.handle.cancelled or self._closed]:
                jobs.remove(job)
                for row in job.rows:
                    self._end(job.handle, row, "cancelled")
        batch = self._batch
        for i in batch.going():
            if batch.handles[i].cancelled or self._closed:
                self._end(batch.handles[i], batch.rows[i], "cancelled", batch.state.select([i]))

    def _prefill(self):
        """Read the next pieces of prompts. Rows whose prompt is read join the batch, those that ended leave it."""
        jobs, pieces = self._pieces()
        batch, read_out, error = self._batch, jobs, None
        try:
            batch = batch.select(batch.going())
            if jobs:
                logits, state = self._read_pieces(jobs, pieces)
                read_out = [job for job in jobs if job.position == len(job.ids)]
                index = [i for i, job in enumerate(jobs) if job in read_out for _ in job.rows]
                if read_out:
                    if self._cache is not None:
                        self._cache.trim()
                    batch = batch.join(batch_of(read_out, logits[index], state.select(index)))
        except Exception as caught:
            error = caught
        with self._changed:
            self._reading = [job for job in self._reading if job not in read_out]
            self._batch = batch
            if error is None:
                self._counts["prefill_tokens"] += sum(map(len, pieces))
            else:
                self._fail(error, [(job.handle, row) for job in jobs for row in job.rows])

    def _pieces(self):
        """The prompts that this step reads, first come first, and of each the next ids (t,)."""
        jobs, pieces, left = [], [], self._max_prefill_tokens
        for job in self._reading:
            if left:
                self._look_up(job)
            size = min(left, self._prefill_chunk)
            if job.prefix is not None:  # no checkpoint is passed over
                size = min(size, self._cache.every - job.position % self._cache.every)
            piece = job.ids[job.position :][:size]
            if len(piece):
                jobs.append(job)
                pieces.append(piece)
                left -= len(piece)
        return jobs, pieces

    def _look_up(self, job):
        """Only when it is a prompt's turn to be read: others may have read its beginning while it waited."""
        if self._cache is not None and job.prefix is None and job.handle.request.state is None:
            job.prefix = self._cache.start(job.ids)
            job.position, job.state = job.prefix.position, job.prefix.state

    def _read_pieces(self, jobs, pieces):
        device = self._model.device
        ids = pad_sequence(pieces, batch_first=True).to(device)
        lengths = lengths_of([len(piece) for piece in pieces], device)
        logits, state = read(self._model, ids, joined([job.state for job in jobs]), lengths)
        for i, (job, piece) in enumerate(zip(jobs, pieces, strict=True)):
            job.position += len(piece)
            if job.prefix is not None:
                self._cache.keep(job.prefix, job.position, state, i)
            job.state = state.select([i]) if job.position < len(job.ids) else None
        return logits, state

    def _decode(self):
        """One token of each row; rows that end read their last token, too."""
        try:
            self._drop_broken()
            batch = self._batch
            if not batch.rows:
                return
            of_rows = zip(
                *((row.rules.sampling, row.generator, row.ids, row.prompt) for row in batch.rows), strict=True
            )
            drawn = Drawn(choose_each(batch.logits, *of_rows), batch.logits)
            ahead = batch.logits.is_cuda
            if ahead:  # a GPU reads the tokens before anyone here has seen them
                batch.logits, batch.state = self._decoder.step(drawn.ids, batch.state)
            events = self._write(batch, drawn.tokens())
            if not ahead:
                batch.logits, batch.state = self._decoder.step(drawn.ids, batch.state)
            ended = [(i, row) for i, row in enumerate(batch.rows) if row.finish_reason in ("stop", "length")]
            completions = [row.completion(batch.state.select([i])) for i, row in ended]
        except BaseException as error:  # of an interrupt, too: rows may have a token that was not read
            with self._changed:
                self._fail(error, list(zip(self._batch.handles, self._batch.rows, strict=True)))
            if isinstance(error, Exception):
                return
            raise
        with self._changed:
            for (i, _), completion in zip(ended, completions, strict=True):
                batch.handles[i]._events.append(replace(events[i], completion=completion))
                self._complete(batch.handles[i], completion)

    def _write(self, batch, tokens):
        """Tell those who wait of each row's next token, if it is not its last. A row without one fails alone."""
        events = [None if id < 0 else row.push(id, p) for row, (id, p) in zip(batch.rows, tokens, strict=True)]
        with self._changed:
            self._counts["generated_tokens"] += sum(event is not None for event in events)
            for handle, row, event in zip(batch.handles, batch.rows, events, strict=True):
                if event is None:
                    self._fail(_broken(), [(handle, row)])
                elif not row.finish_reason:
                    handle._events.append(event)
            self._changed.notify_all()
        return events

    def _drop_broken(self):
        """A row whose logits are NaN fails alone: the others must not fail with it. (On a GPU its next id says so.)"""
        batch = self._batch
        if batch.rows and not batch.logits.is_cuda and not (healthy := batch.logits.amax(-1).isfinite()).all():
            broken = [(batch.handles[i], batch.rows[i]) for i in (~healthy).nonzero()[:, 0].tolist()]
            with self._changed:
                self._fail(_broken(), broken)
                self._batch = batch.select(batch.going())

    # ---- what a request goes through; the lock is held ----

    def _busy(self) -> bool:
        return bool(self._waiting or self._reading or self._batch.going())

    def _slots(self) -> int:
        return len(self._batch.going()) + sum(len(job.rows) for job in self._reading)

    def _fail(self, error, handles_and_rows):
        traceback.clear_frames(error.__traceback__)  # else a handle that is kept would keep their tensors
        for handle, row in handles_and_rows:
            if row.sample_index not in handle._completions:
                handle.error = error
                self._end(handle, row, "error")

    def _end(self, handle, row, reason, state=None):
        row.finish_reason = reason
        self._complete(handle, row.completion(state))

    def _complete(self, handle, completion):
        handle._completions[completion.sample_index] = completion
        if handle.done:
            reasons = {c.finish_reason for c in handle._completions.values()}
            outcome = "failed" if "error" in reasons else "cancelled" if "cancelled" in reasons else "finished"
            self._counts[outcome] += 1

    def _job(self, request) -> Job:
        """The request, checked: from here on only the model itself can refuse it."""
        [prompt] = checked_prompts(self._model, [request.prompt], request.state)
        rules = Rules(request.max_new_tokens, request.sampling, request.stop_ids, (), None, logprobs=True)
        check_rules(rules, self._model.config.vocab_size)
        require_positive(n=request.n)
        if request.n > self._max_batch:
            raise AnymambaError(f"engine: n={request.n} completions, but max_batch={self._max_batch}; ask for fewer")
        [generators] = row_generators(request.seed, 1, request.n)
        prompt = prompt.clone()  # the caller's may change before it is read
        rows = [Row(rules, 0, i, prompt, generator) for i, generator in enumerate(generators)]
        return Job(Handle(request, self), prompt, rows, checked_state(self._model, request.state))


def _broken() -> AnymambaError:
    return AnymambaError("engine: the next token's logits are NaN or all -inf; check the model's weights, or the state "
                         "given")  # fmt: skip
