"""What the tests of GGUF and the golden values of llama.cpp share: models, prompts, and llama.cpp itself."""

import ctypes
from pathlib import Path

import torch

from anymamba import MambaConfig, MambaLM, SamplingConfig, checkpoint
from anymamba.checkpoint import gguf
from anymamba.generate import generate
from conftest import REPO

BOOKS = REPO / "src" / "anymamba" / "models" / "books"
GOLDEN = Path(__file__).parent / "golden" / "llama.json"
KINDS = ("F32", "F16", "BF16", "Q8_0")
# beginnings of a text after which no kind of weights comes near a tie between two tokens in 64 greedy steps
PROMPTS = ("The old man", "In the morning they")
STEPS = 64
# of the largest logit: llama.cpp rounds what it multiplies with weights to their kind, so from F16 on this is its error
TOLERANCE = {"F32": 2e-6, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 2e-2}
CASES = [("odd", "F32"), *(("books", kind) for kind in KINDS)]


def odd_model() -> MambaLM:
    """Every size odd, an untied head, and the same weights on every machine."""
    model = MambaLM(MambaConfig(vocab_size=61, d_model=40, n_layer=3, d_state=7, d_conv=3, dt_rank=5,
                                tie_embeddings=False, norm_eps=3e-6))  # fmt: skip
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64) * (1.3 + 0.1 * k)).view(p.shape)
            base = 1 if name.endswith(("norm.weight", "norm_f.weight", ".D")) else -2 if "dt_proj.bias" in name else 0
            p.copy_(base + wave * (0.5 if p.dim() == 1 or "A_log" in name else 2 * p.shape[-1] ** -0.5))
    return model


def models() -> dict[str, MambaLM]:
    return {"odd": odd_model(), "books": checkpoint.load(BOOKS).float()}


def prompts(name: str) -> list[list[int]]:
    return [list(prompt.encode()) if name == "books" else [3, 1, 4, 1, 5, 9, 2, 6] for prompt in PROMPTS]


def assemble(path, dtype=None) -> MambaLM:
    """The model of a GGUF file, from the module's own functions; in `dtype`, or in that of its matrices."""
    with torch.device("meta"):
        model = MambaLM(gguf.read_config(path))
    tensors = dict(gguf.tensors(path))
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.to(dtype or model.backbone.layers[0].mixer.in_proj.weight.dtype)


def logits(model, ids: list[int]) -> torch.Tensor:
    """Our logits (v,) after ids."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), last_only=True).logits[0, -1].float()


def written(model, starts: list[list[int]]) -> list[list[int]]:
    """What our model writes greedily after each start."""
    return [done.ids for done in generate(model, starts, max_new_tokens=STEPS, sampling=SamplingConfig(temperature=0))]


class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, path):
        import llama_cpp as api

        Llama.quiet = Llama.quiet or api.llama_log_callback(lambda level, text, data: None)  # C keeps no reference
        api.llama_log_set(Llama.quiet, None)
        self.api, options = api, api.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(str(path).encode(), options)
        assert self.model, f"llama.cpp does not load {path}"
        options = api.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = 512, 2, 2
        self.context = api.llama_init_from_model(self.model, options)
        self.vocab = api.llama_model_get_vocab(self.model)
        self.size = api.llama_vocab_n_tokens(self.vocab)

    quiet = None

    def step(self, ids) -> torch.Tensor:
        """Logits (v,) after ids, from where it stands."""
        array = self._array(ids)  # C keeps no reference to it either
        assert not self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(ids)))
        logits = ctypes.cast(self.api.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float))
        return torch.tensor(logits[: self.size])

    def written(self, ids: list[int], vocab_size: int) -> list[int]:
        """What it writes greedily after ids, from the start of a text."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        out, logits = [], self.step(ids)
        for _ in range(STEPS):
            out.append(int(logits[:vocab_size].argmax()))
            logits = self.step(out[-1:])
        return out

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it understood."""
        raw, room = text.encode(), self._array([0] * (4 * len(text) + 8))
        return room[: self.api.llama_tokenize(self.vocab, raw, len(raw), room, len(room), False, True)]

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def _array(self, ids):
        return (self.api.llama_token * len(ids))(*ids)
