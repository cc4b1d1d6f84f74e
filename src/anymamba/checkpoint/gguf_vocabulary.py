"""A tokenizer in the metadata of a GGUF file: llama.cpp's "gpt2" kind, which is byte-level BPE.

A tokenizer.json travels whole under the key that the GGUF specification has for it, besides the lists that llama.cpp
reads. Where a file has only the lists, they make a tokenizer.json again.
"""

import json
from pathlib import Path
from typing import Any

from anymamba.checkpoint.gguf_file import GgufFile
from anymamba.errors import AnymambaError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of a token
LISTS, WHOLE, TEMPLATE = "tokenizer.ggml.", "tokenizer.huggingface.json", "tokenizer.chat_template"
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message: each ends an answer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {  # llama.cpp's name → how a tokenizer.json says the same
    "gpt-2": BYTE_LEVEL,
    "falcon": {"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        BYTE_LEVEL,
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ]},
}  # fmt: skip
SAME_AS_GPT2 = ("mpt", "olmo", "phi-2", "jais")  # names of other models whose text is cut as GPT-2's

# GPT-2's writing of the 256 bytes as characters that can be seen: printable ones stand for themselves
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [b for b in range(256) if b not in _SEEN]
BYTES = [chr(b if b in _SEEN else 256 + _UNSEEN.index(b)) for b in range(256)]
END_OF_TEXT = "<|endoftext|>"
NO_MERGE = f"{END_OF_TEXT} {END_OF_TEXT}"  # llama.cpp wants merges; bytes never make the parts of this one
BYTE_TOKENIZER = {"type": "bytes", "vocab_size": 257, "eos_id": 256}  # as anymamba writes it in a tokenizer.json


# ---- writing ----


def fields(tokenizer: Any, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer for an embedding of so many rows; None is a model without one.

    Raises AnymambaError for a tokenizer that llama.cpp has no word for, or with more tokens than rows.
    """
    if tokenizer is None:
        return {LISTS + "model": "no_vocab"}
    text = tokenizer.to_json()
    described = json.loads(text)
    if described == BYTE_TOKENIZER or _only_bytes(described.get("model", {})):
        tokens, types = dict(enumerate([*BYTES, END_OF_TEXT])), {256: CONTROL}
        pre, merges, whole = "gpt-2", [NO_MERGE], {}
    else:
        pre, model = _pre(described, tokenizer.name), described["model"]
        tokens, types = {i: token for token, i in model["vocab"].items()}, {}
        for token in described["added_tokens"]:
            tokens[token["id"]] = token["content"]
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        merges, whole = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]], {WHOLE: text}
    if max(tokens) >= rows:
        raise AnymambaError(f"the tokenizer {tokenizer.name!r} has ids up to {max(tokens)}, the model only {rows}: "
                            "give the tokenizer that it was trained with")  # fmt: skip
    out = {"model": "gpt2", "pre": pre, "tokens": [tokens.get(i, f"[PAD{i}]") for i in range(rows)],
           "token_type": [types.get(i, NORMAL) if i in tokens else UNUSED for i in range(rows)],
           "merges": merges or [NO_MERGE], "add_bos_token": False, "add_eos_token": False}  # fmt: skip
    out |= dict(zip(ENDS, tokenizer.eos_ids, strict=False))
    bos = next((i for i, token in tokens.items() if token == tokenizer.special.tokens.get("bos_token")), None)
    bos = bos if bos is not None else tokenizer.eos_id
    out |= {} if bos is None else {"bos_token_id": bos}  # else llama.cpp assumes id 11
    template = {TEMPLATE: tokenizer.special.chat_template} if tokenizer.special.chat_template else {}
    return {LISTS + k: v for k, v in out.items()} | whole | template


def _only_bytes(model: dict) -> bool:
    """Whether a tokenizer.json's model is the bytes and nothing else, as `convert --to hf` writes them."""
    return model.get("vocab") == {name: i for i, name in enumerate(BYTES)} and not model.get("merges")


def _pre(described: dict, name: str) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text before the merges."""
    model, decoder, pre = described["model"], described.get("decoder") or {}, described.get("pre_tokenizer")
    odd = [k for k in ("byte_fallback", "ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
           if model.get(k)]  # fmt: skip
    if model.get("type") == "BPE" and decoder.get("type") == "ByteLevel" and not odd:
        for known, value in PRE_TOKENIZERS.items():
            if pre is not None and _full(pre) == _full(value):
                return known
    what = f"{model.get('type')} with {', '.join(odd) or f'the pre-tokenizer {json.dumps(pre)}'}"
    raise AnymambaError(
        f"the tokenizer {name!r} cannot go into a GGUF file: it is {what}, and only byte-level BPE that cuts text as "
        f"{' or '.join(PRE_TOKENIZERS)} does is written; leave it out (convert --no-tokenizer), and give llama.cpp ids"
    )


def _full(pre: dict) -> dict:
    """A pre-tokenizer with the defaults that older files leave out; offsets have no part in the ids."""
    if pre["type"] == "Sequence":
        return pre | {"pretokenizers": [_full(one) for one in pre["pretokenizers"]]}
    return BYTE_LEVEL | pre | {"trim_offsets": True} if pre["type"] == "ByteLevel" else pre


# ---- reading ----


def read_tokenizer(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer, as the contents of the files that models are published with:
    tokenizer.json (text), tokenizer_config.json and generation_config.json (dicts).

    Raises AnymambaError for a file without a tokenizer, or with one that is not byte-level BPE.
    """
    file = GgufFile(path)
    kind, pre = file.fields.get(LISTS + "model"), file.fields.get(LISTS + "pre")
    cure = "give the model's own with --tokenizer"
    if kind in (None, "no_vocab"):
        raise AnymambaError(f"{path} holds no tokenizer: {cure}")
    if kind != "gpt2":
        raise AnymambaError(f"{path} has a tokenizer of the kind {kind!r}, and only 'gpt2' is read: {cure}")
    tokens, text = file.fields.get(LISTS + "tokens") or [], file.fields.get(WHOLE)
    if text is None:
        name = "gpt-2" if pre in SAME_AS_GPT2 else pre
        if name not in PRE_TOKENIZERS:
            raise AnymambaError(f"{path} has a tokenizer with the pre-tokenizer {pre!r}, and only "
                                f"{', '.join([*PRE_TOKENIZERS, *SAME_AS_GPT2])} are known: {cure}")  # fmt: skip
        text = json.dumps(_described(file, tokens, PRE_TOKENIZERS[name]))
    ends = [i for i in (file.fields.get(LISTS + key) for key in ENDS) if i is not None]
    config, bos = {}, file.fields.get(LISTS + "bos_token_id", len(tokens))
    if ends and ends[0] < len(tokens):
        config["eos_token"] = tokens[ends[0]]
    if bos < len(tokens):
        config["bos_token"] = tokens[bos]
    if TEMPLATE in file.fields:
        config["chat_template"] = file.fields[TEMPLATE]
    return {"tokenizer.json": text, "tokenizer_config.json": config, "generation_config.json": {"eos_token_id": ends}}


def _described(file: GgufFile, tokens: list[str], pre: dict) -> dict:
    """A tokenizer.json from the lists."""
    merges, types = file.fields.get(LISTS + "merges"), file.fields.get(LISTS + "token_type")
    if merges is None or types is None or len(types) != len(tokens):
        raise AnymambaError(
            f"{file.path} has a tokenizer without merges or types: give the model's own with --tokenizer"
        )
    count = used(tokens, types)
    if tokens[:count] == [*BYTES, END_OF_TEXT] and merges == [NO_MERGE]:
        return BYTE_TOKENIZER
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": tokens[i], "special": types[i] == CONTROL, **flags}
             for i in range(count) if types[i] in (CONTROL, USER_DEFINED)]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {tokens[i]: i for i in range(count)}, "merges": [m for m in merges if m != NO_MERGE]}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": pre, "post_processor": None, "decoder": BYTE_LEVEL, "model": model}  # fmt: skip


def used(tokens: list[str], types: list[int]) -> int:
    """Tokens without the unused ones at the end, which fill the embedding up to a round size."""
    return next((i for i in range(len(tokens), 0, -1) if types[i - 1] != UNUSED), 0)
