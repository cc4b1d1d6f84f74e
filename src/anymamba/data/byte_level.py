"""The byte tokenizer as a `tokenizer.json`, for software that knows no other."""

from anymamba.checkpoint.gguf_vocabulary import BYTES


def byte_level_tokenizer():
    """A `tokenizers.Tokenizer` with the ids of `ByteTokenizer`: 0..255 the bytes, 256 `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
