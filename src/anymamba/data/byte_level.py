"""The byte tokenizer as a `tokenizer.json`, for software that knows no other."""


def byte_level_tokenizer():
    """A `tokenizers.Tokenizer` with the ids of `ByteTokenizer`: 0..255 the bytes, 256 `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(byte_names())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def byte_names() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 has them: printable ones for
    themselves, the others for characters from 256 on, in their order."""
    unseen = iter(range(256, 512))
    return [chr(b if chr(b).isprintable() and chr(b) != " " else next(unseen)) for b in range(256)]
