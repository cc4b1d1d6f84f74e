"""mamba-130m on the CPU beside llama.cpp, with the same random weights: decoding and reading a prompt.

    python benchmarks/cpu_llama.py              all of it, about two minutes
    python benchmarks/cpu_llama.py decode       one part: decode or prefill

The floor is the time to read the weights (and to read and write the state) at the bandwidth that all threads reach
together, measured in the same run. The peer is llama.cpp through llama-cpp-python, compiled for this processor; it gets
the weights as GGUF files, which the gguf package writes. Without these two packages only our own figures are printed.
"""

import ctypes
import functools
import importlib.util
import os
import tempfile

import numpy as np
import torch

from anymamba import MambaConfig, MambaLM, quantize
from anymamba.checkpoint.gguf import save
from anymamba.generate.decode import Decoder
from common import Report, arguments, measure, median, quiet, ratio, spread, versions
from cpu_limits import read_bandwidth

PROMPT, STEPS, PREFILL = 32, 30, 512
OURS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "int8": (torch.float32, "int8"),
        "int4": (torch.float32, "int4")}  # fmt: skip
DECODE = {"fp32": "≥ 1.1", "bf16": "≥ 1.3", "int8": "≥ 1", "int4": "≥ 1"}  # times the peer's speed
READ = {"fp32": "≥ 2", "bf16": "≥ 10 with AMX", "int8": "≥ 1"}
PEERS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # GGUF's type beside each of ours


# ---- ours ------------------------------------------------------------------------------------------------------


def build(name):
    torch.manual_seed(0)
    dtype, kind = OURS[name]
    model = MambaLM(MambaConfig.preset("130m")).to(dtype)
    return quantize(model, kind) if kind else model


@torch.inference_mode()
def start(model, b):
    return model(torch.randint(0, 50277, (b, PROMPT))).state


class Decoding:
    """Decodes the same token again and again for b rows."""

    def __init__(self, model, b):
        self.decoder, self.state, self.ids = Decoder(model), start(model, b), torch.full((b,), 17)

    def step(self):
        """Logits (b,v)."""
        logits, self.state = self.decoder.step(self.ids, self.state)
        return logits


@torch.inference_mode()
def read(model, ids):
    """Logits of the last of ids (1,t)."""
    return model(ids, last_only=True).logits[0, -1]


# ---- the peer --------------------------------------------------------------------------------------------------


def missing():
    """Why there is no peer, or None."""
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (pip install llama-cpp-python gguf)" if absent else None


class Llama:
    """A GGUF file in llama.cpp, on as many threads as torch has."""

    def __init__(self, path):
        import llama_cpp as api

        self.api, self.nbytes = api, os.path.getsize(path)
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), options)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 4096, PREFILL, PREFILL
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = api.llama_init_from_model(self.model, options)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def step(self, ids):
        """Logits after the last of ids, from where it stands."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

    def read(self, ids):
        """`step` from the start of a text."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self.step(ids)


def peers(report, names, folder):
    """llama.cpp with our weights in the type beside each of `names`; only such as say what we say."""
    if why := missing():
        report.add("llama.cpp", f"skipped: {why}", skipped=why)
        return {}
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, None)
    peers.keep = callback  # C holds no reference
    report.card["versions"] |= versions("llama-cpp-python", "gguf")
    report.add("llama.cpp", f"{llama_cpp.__version__}: {llama_cpp.llama_print_system_info().decode()}",
               system=llama_cpp.llama_print_system_info().decode())  # fmt: skip
    original, ids, found = build("fp32"), torch.randint(0, 50277, (1, PROMPT)), {}
    want = read(original, ids).numpy()
    for name in names:
        path = os.path.join(folder, f"{PEERS[name]}.gguf")
        save(original, path, dtype=PEERS[name])
        found[name] = Llama(path)
        got = found[name].read(ids[0].tolist())
        alike, same = np.corrcoef(want, got)[0, 1], int(want.argmax()) == int(got.argmax())
        report.add(f"llama.cpp {PEERS[name]} says what we say", f"correlation {alike:.6f}, same next token: {same}",
                   correlation=float(alike), same=same)  # fmt: skip
        if alike < (0.95 if name == "int4" else 0.999):
            raise SystemExit(f"{path} gives other logits than ours: the comparison would mean nothing")
    return found


# ---- measurements ----------------------------------------------------------------------------------------------


def show(report, what, times, sizes, tokens, bandwidth, targets):
    """Tokens a second of each, and which part of its time reading the weights would take."""
    for name, v in times.items():
        speed, share = tokens[name] / median(v), sizes[name] / bandwidth / median(v)
        report.add(f"{what} {name}, ms", f"{spread(v)}  {speed:8.1f} tokens/s, weights {100 * share:3.0f} %",
                   median=median(v), tokens_per_s=speed, share=share)  # fmt: skip
    for name in OURS:
        if f"llama.cpp {PEERS[name]}" in times and name in times:
            report.compare(f"{what} {name} vs llama.cpp", times, name, f"llama.cpp {PEERS[name]}", targets[name])


def decode(report, bandwidth, folder):
    models = {name: build(name) for name in OURS}
    rows, functions, sizes, tokens = {name: (name, 1) for name in OURS}, {}, {}, {}
    rows |= {f"{name} batch 8": (name, 8) for name in ("bf16", "int8")}
    for key, (name, b) in rows.items():
        model = models[name]
        functions[key] = Decoding(model, b).step
        sizes[key], tokens[key] = model.bytes_per_step(b), b
    for name, peer in peers(report, OURS, folder).items():
        key = f"llama.cpp {PEERS[name]}"
        functions[key] = functools.partial(peer.step, [17])
        state = models["fp32"].bytes_per_step(1) - models["fp32"].bytes_per_step(0)
        sizes[key], tokens[key] = peer.nbytes + state, 1
    times = measure(functions, rounds=STEPS)
    show(report, "decode", times, sizes, tokens, bandwidth, DECODE)
    for name in ("bf16", "int8"):
        more = 8 * ratio(times[name], times[f"{name} batch 8"])
        report.add(f"decode {name}: batch 8 over batch 1", f"{more:8.2f} × the tokens/s   (target ≥ 4)", ratio=more)


def prefill(report, bandwidth, folder):
    ids, names = torch.randint(0, 50277, (1, PREFILL)), ("fp32", "bf16", "int8")
    models = {name: build(name) for name in names}
    functions = {name: functools.partial(read, model, ids) for name, model in models.items()}
    sizes = {name: model.bytes_per_step(1) for name, model in models.items()}
    for name, peer in peers(report, names, folder).items():
        functions[f"llama.cpp {PEERS[name]}"] = functools.partial(peer.read, ids[0].tolist())
        sizes[f"llama.cpp {PEERS[name]}"] = peer.nbytes
    times = measure(functions, rounds=5)
    show(report, f"prefill {PREFILL}", times, sizes, dict.fromkeys(times, PREFILL), bandwidth, READ)


PARTS = {"decode": decode, "prefill": prefill}


def main():
    quiet()
    parts = arguments() or list(PARTS)
    report = Report("cpu_llama" if parts == list(PARTS) else f"cpu_llama_{'_'.join(parts)}")
    bandwidth = read_bandwidth()
    report.add("machine", f"read {bandwidth / 1e9:.1f} GB/s", read=bandwidth)
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](report, bandwidth, folder)
    report.close()


if __name__ == "__main__":
    main()
