"""The training loop. A run is a folder; its state is (weights, moments, step, time), and all else follows from them.

Axes: b batch, t time.
"""

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from anymamba import checkpoint, lora
from anymamba.data import Batches, Tokenizer, prepare
from anymamba.errors import AnymambaError
from anymamba.generate import SamplingConfig, generate
from anymamba.model import MambaLM, eval_mode
from anymamba.state import MambaState
from anymamba.train import checkpointing
from anymamba.train.config import TrainConfig
from anymamba.train.diagnose import first_nonfinite
from anymamba.train.display import Display, Silent
from anymamba.train.evaluate import Evaluation, evaluate
from anymamba.train.hardware import choose_device, choose_precision
from anymamba.train.interrupt import Interrupt
from anymamba.train.log import Log, plot
from anymamba.train.passes import Passes
from anymamba.train.runs import first_ids, text_digest, typical_start
from anymamba.train.schedule import Every, learning_rate
from anymamba.train.start import CONFIG, absolute, load_start, new_adapter, new_folder
from anymamba.train.update import Step, Update

LOOKING = 0.1  # share of a run by the clock for measurements and samples


@dataclass(frozen=True)
class Result:
    """How a run, or a part of one, ended."""

    run: Path
    step: int
    model: MambaLM = field(repr=False)
    interrupted: int | None = None  # by this signal
    evaluation: Evaluation | None = None  # on the held-out text; None if interrupted
    sample: str | None = None
    prompt: str = ""  # what the sample begins with, from the held-out text
    plot: str | None = None  # where the loss curve is, or how to get one


def train(config: TrainConfig, display: Display | None = None) -> Result:
    """Start a run in the folder `config.out`, or runs/DATE-TIME, and see it to its end.

    The first Ctrl-C or SIGTERM ends it early, saved, with `Result.interrupted`. Raises AnymambaError for text or sizes
    that cannot be used, a folder that holds a run already, a full disk, and a loss that is not finite.
    """
    run = new_folder(config.out)
    made = next((p for p in reversed([run, *run.parents]) if not p.exists()), None)
    try:
        # absolute, so that the run can be resumed from anywhere
        paths = config.data and tuple(map(absolute, config.data))
        config = config.replace(data=paths, out=None, init=config.init and absolute(config.init))
        model, tokenizer = load_start(config, config.tokenizer)
        trainer = Trainer(run, config, tokenizer, display or Silent(), model)
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(run)
        (run / CONFIG).write_text(config.to_json(), encoding="utf-8")
    except BaseException:
        if made is not None:  # nothing half-made stays
            shutil.rmtree(made, ignore_errors=True)
        raise
    return trainer.run_to_end()


def resume(run: str | Path, display: Display | None = None) -> Result:
    """Go on with a run from its newest whole checkpoint, or from the beginning if there is none.

    A run of a fixed number of steps ends with the same bits as if it had never stopped, given the same machine and
    number of threads. Raises AnymambaError for a folder that is no run, one that has ended, text that has changed
    since, and whatever `train` raises.
    """
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise AnymambaError(f"no run to resume in {run}: it has no {CONFIG}. Runs are folders such as runs/NAME")
    config = TrainConfig.from_file(run / CONFIG)
    model, tokenizer = load_start(config, run)
    trainer = Trainer(run, config, tokenizer, display or Silent(), model)
    trainer.restore()
    return trainer.run_to_end()


class Trainer:
    """One run in memory; of a new model, or of `model` to fine-tune."""

    def __init__(self, run: Path, config: TrainConfig, tokenizer: Tokenizer, display: Display,
                 model: MambaLM | None = None):  # fmt: skip
        self.folder, self.config, self.tokenizer, self.display = run, config, tokenizer, display
        self.device = choose_device(config.device)
        folder = Path(config.tokens).expanduser() if config.tokens else run / "tokens"
        self.data = prepare(config.data, tokenizer, folder, field=config.field, holdout=config.holdout)
        self.prompt = typical_start(self.data.heldout, tokenizer)  # of samples
        self.batches = Batches(self.data.train, config.batch_size, config.seqlen, config.seed, config.carry)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            torch.manual_seed(config.seed)
            model = model or MambaLM(config.model_config(tokenizer.vocab_size))
            self.model = model.to(self.device)
            self.adapter = new_adapter(self.model, config)
        self.model.recompute, self.model.dropout = config.recompute, config.dropout
        self.passes = Passes(self.model, config, self.batches, self.data.eos_id)
        self.update = Update(self.model, config)
        self.step = 0  # steps handed to the device
        self.unread: list[Step] = []  # those of them whose loss has not been looked at
        self.ahead = 1 if self.device.type == "cuda" else 0  # a GPU has a step to do while we look at the last one
        self.saved_step: int | None = None
        self.precision: str | None = None
        self.state: MambaState | None = None  # carried to the next batch
        self.seconds_before = 0.0  # in earlier processes
        self.began = time.monotonic()
        self.read = 0.0  # when the last loss became known
        self.looking = 0.0  # seconds of it spent on measurements and samples, in this process
        self.rate = 0.0  # tokens per second, smoothed

    # ---- where the run stands ----

    @property
    def weights(self) -> MambaLM | lora.Adapter:
        """What is trained, and saved."""
        return self.adapter or self.model

    @property
    def seconds(self) -> float:
        """Time spent training, in this process and those before it."""
        return self.seconds_before + time.monotonic() - self.began

    @property
    def progress(self) -> float:
        """From 0 to 1, by steps or by the clock."""
        total = self.config.seconds
        return self.step / self.config.steps if total is None else self.seconds / total

    @property
    def seconds_left(self) -> float:
        if self.config.seconds is not None:
            return self.config.seconds - self.seconds
        return (self.config.steps - self.step) * self.seconds / max(self.step, 1)

    def restore(self) -> None:
        """Take everything from the newest whole checkpoint."""
        found = checkpointing.load(self.folder, self.device)
        if found is None:
            self.display.note(f"{self.folder} has no checkpoint yet: beginning again")
            return
        folder, tensors, meta, damaged = found
        if damaged:
            self.display.note(f"skipped damaged checkpoints: {', '.join(damaged)}")
        if meta["text"] != text_digest(self.data):
            raise AnymambaError(
                f"the text of {self.folder} has changed since the run began ({self.config.data or 'standard library'}):"
                f" put it back, or start a new run with  anymamba train --config {self.folder / CONFIG}"
            )
        # copies: memory that is aligned as in a process that never stopped gives the same bits
        if self.adapter is not None:
            self.adapter.restore(folder)
        else:
            self.model.load_state_dict(checkpoint.load(folder, device=self.device).state_dict())
        tensors = {name: v.clone() for name, v in tensors.items()}
        checkpointing.restore_optimizer(self.model, self.update.adamw, tensors)
        self.state = checkpointing.restored_state(tensors, self.model.config.n_layer)
        self.step = self.saved_step = meta["step"]
        self.precision, self.seconds_before = meta["precision"], meta["seconds"]
        if meta["threads"] != torch.get_num_threads():
            now = torch.get_num_threads()
            self.display.note(f"{meta['threads']} threads before and {now} now: the last digits will differ")
        self.display.note(f"resuming {self.folder} after step {self.step}")

    # ---- the loop ----

    def run_to_end(self) -> Result:
        if self.step and self.progress >= 1:
            self.display.note(f"{self.folder} has done all of its {self.step} steps")
        noted = Interrupt(lambda signum: self.display.note("stopping after this step; again to stop at once"))
        try:
            with noted:
                self._begin()
                while self.progress < 1 and noted.signum is None:
                    self._train_step()
                    self._report()
                self._save()
            if noted.signum is not None:
                return Result(self.folder, self.step, self.model, interrupted=noted.signum)
            return self._finish()
        except BrokenPipeError:  # whoever read our output has gone; the command line knows what to do
            raise
        except OSError as error:
            raise AnymambaError(
                f"cannot write to {self.folder}: {error.strerror or error}. The last checkpoint is whole: free some "
                f"space, then  anymamba train --resume {self.folder}"
            ) from error
        finally:
            self.display.close()
            if hasattr(self, "log"):
                self.log.close()

    def _begin(self) -> None:
        config = self.config
        self.log = Log(self.folder, self.step, config.tensorboard)
        if self.precision is None:
            self.precision, why = choose_precision(config.precision, self.device, self._try_precision)
            self.display.note(f"precision {self.precision}: {why}")
        self._try_precision(self.precision)  # kernels are compiled here, not on the run's time
        if why_not := self.passes.record(self.precision):
            self.display.note(why_not)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        size, text = self.model.num_params(), len(self.data.train)
        part = "" if trained == size else f", {trained / 1e6:.3f}M of them trained ({trained / size:.2%})"
        self.display.note(f"{size / 1e6:.2f}M parameters{part}, {text / 1e6:.2f}M tokens of text, run in {self.folder}")
        if config.init is not None and self.step == 0:
            self._measure()  # before it has learned anything of this text
        self.began = time.monotonic()
        progress = self.progress
        self.eval_due = Every(config.eval_every, share=0.1, progress=progress)
        self.sample_due = Every(config.sample_every, share=0.2, progress=progress)
        self.save_due = Every(config.save_every, seconds=60, progress=progress)

    def _train_step(self) -> None:
        config, begin = self.config, time.monotonic()
        lr = learning_rate(self._schedule_progress(), lr=config.lr, min_lr=config.min_lr, warmup=config.warmup)
        self.model.zero_grad(set_to_none=True)
        losses, starts = [], []
        for micro in range(config.accumulate):
            index = self.step * config.accumulate + micro
            before = None if self.batches.starts_fresh(index) else self.state
            loss, after = self.passes.backward(index, before, self.precision)
            losses.append(loss)
            starts.append((index, before))
            self.state = after.detach() if config.carry else None
        reading = self.update(losses, lr)
        self.step += 1
        self.unread.append(Step(self.step, lr, begin, time.monotonic(), starts, reading))
        self._settle(keep=self.ahead)

    def _settle(self, keep: int = 0) -> None:
        """Look at the losses of all steps but the last `keep`."""
        while len(self.unread) > keep:
            step = self.unread.pop(0)
            *losses, norm = step.reading.get()
            for loss, start in zip(losses, step.starts, strict=True):
                if not math.isfinite(loss):
                    self._stop_nonfinite(step, f"loss is {loss}", *start)
            if not math.isfinite(norm):
                self._stop_nonfinite(step, f"norm of the gradient is {norm}", *step.starts[-1])
            begin, self.read = max(step.begin, self.read), time.monotonic()
            took = max(self.read - begin, step.end - step.begin)  # of two read at once, neither took less than its host
            self._log_step(step, sum(losses) / len(losses), norm, took)

    def _schedule_progress(self) -> float:
        """Progress at the end of the coming step: the first one moves, and the last one has the lowest rate."""
        if self.config.steps is not None:
            return (self.step + 1) / self.config.steps
        mean = self.seconds / max(self.step, 1)
        return min(1.0, (self.seconds + mean) / self.config.seconds)

    def _stop_nonfinite(self, step: Step, what: str, index: int, before: MambaState | None):
        self.passes.release()
        where = first_nonfinite(self.model, lambda: self.passes.loss(index, before, self.precision)[0])
        other = "" if self.precision == "fp32" else ", --precision fp32"
        last = "there is no checkpoint yet: start again"
        if self.saved_step is not None:
            last = f"or go on from step {self.saved_step} with  anymamba train --resume {self.folder}"
        raise AnymambaError(
            f"step {step.number}: the {what}, and training cannot go on. {where[0].upper()}{where[1:]}.\n"
            f"Try a lower --lr (it is {self.config.lr}), a longer --warmup{other}; {last}"
        )

    def _try_precision(self, precision: str) -> None:
        loss = self.passes.loss(0, None, precision)[0]
        if loss.requires_grad:  # else no adapter had a part in it
            loss.backward()
        if self.adapter is not None:
            self.adapter.check_gradients()
        self.model.zero_grad(set_to_none=True)

    # ---- what is said and saved ----

    def _log_step(self, step: Step, loss: float, norm: float, seconds: float) -> None:
        config = self.config
        tokens = config.batch_size * config.seqlen * config.accumulate
        rate = tokens / max(seconds, 1e-9)
        self.rate = rate if self.rate == 0 else 0.9 * self.rate + 0.1 * rate
        record = {"step": step.number, "loss": loss, "lr": step.lr, "grad_norm": norm, "tokens": tokens * step.number}
        record |= {"tokens_per_second": round(self.rate, 1), "seconds": round(self.seconds, 3)}
        self.log.write(record)
        self.display.step(record, min(1.0, self.progress), self.seconds_left)

    def _report(self) -> None:
        progress, begin = self.progress, time.monotonic()
        # by the clock, looking must not eat up the time for learning, however slow the machine is
        has_time = self.config.seconds is None or self.looking <= LOOKING * self.seconds
        if has_time and self.eval_due.is_due(self.step, progress):
            self._measure()
        if has_time and self.sample_due.is_due(self.step, progress):
            self._settle()
            text = self._sample(self.config.sample_tokens)
            self.log.write({"step": self.step, "sample": text})
            self.display.sample(text)
        self.looking += time.monotonic() - begin
        if self.save_due.is_due(self.step, progress):
            self._save()

    def _measure(self) -> None:
        self._settle()
        # windows all over the text, long enough that their beginnings weigh little; the end measures without cuts
        context = max(self.config.seqlen, 1024)
        result = self._evaluate(context=context, carry=False, max_tokens=self.config.eval_tokens)
        self.log.write({"step": self.step, "heldout_nats": result.nats, "heldout_bits_per_byte": result.bits_per_byte})
        self.display.heldout(result.nats, result.bits_per_byte)

    def _evaluate(self, **options) -> Evaluation:
        bytes_per_token = self.data.heldout_bytes / len(self.data.heldout)
        return evaluate(self.model, self.data.heldout, bytes_per_token=bytes_per_token, **options)

    def _sample(self, length: int) -> str:
        sampling = SamplingConfig(temperature=0.8, top_p=0.95)
        prompt = self.tokenizer.encode(self.prompt).tolist() or first_ids(self.tokenizer)
        with eval_mode(self.model):
            done = generate(self.model, [prompt], max_new_tokens=length, sampling=sampling, tokenizer=self.tokenizer)
        return self.prompt + (done[0].text or "")

    def _save(self) -> None:
        self._settle()
        if self.saved_step == self.step:
            return
        meta = {"step": self.step, "seconds": self.seconds, "precision": self.precision,
                "threads": torch.get_num_threads(), "text": text_digest(self.data)}  # fmt: skip
        tensors = checkpointing.optimizer_tensors(self.model, self.update.adamw)
        tensors |= checkpointing.state_tensors(self.state)
        checkpointing.save(self.folder, self.weights, tensors, meta, self.config.keep)
        self.weights.save_pretrained(self.folder)  # where `anymamba generate RUN` looks for it
        self.saved_step = self.step

    def _finish(self) -> Result:
        self.weights.save_pretrained(self.folder)  # the run may have been killed before it could
        self.display.note("measuring the loss on the held-out text")
        most = min(self.config.final_tokens, len(self.data.heldout) - 1)
        result = self._evaluate(max_tokens=most, on_progress=lambda count: self.display.measuring(count / most))
        sample = self._sample(2 * self.config.sample_tokens)
        record = {"step": self.step, "seconds": round(self.seconds, 3), "final_nats": result.nats}
        record |= {"final_bits_per_byte": result.bits_per_byte, "final_tokens": result.tokens}
        self.log.write(record | {"sample": sample})
        return Result(self.folder, self.step, self.model, None, result, sample, self.prompt, plot(self.folder))
