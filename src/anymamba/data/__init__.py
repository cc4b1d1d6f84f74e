"""Text for training: corpora, tokenizers, tokens on disk, resumable batches.

tokenizer = load_tokenizer("bytes")
data = prepare(["shakespeare.txt"], tokenizer, Path("tokens"))
ids, labels = Batches(data.train, batch_size=8, seqlen=512).batch(step=0)
"""

from anymamba.data.batches import Batches, cu_seqlens_at_eos, heldout_batches
from anymamba.data.bpe import train_bpe
from anymamba.data.corpus import Document, documents
from anymamba.data.tokenizer import ByteTokenizer, JsonTokenizer, StreamDecoder, Tokenizer, load_tokenizer
from anymamba.data.tokens import TokenData, prepare

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Document",
    "JsonTokenizer",
    "StreamDecoder",
    "TokenData",
    "Tokenizer",
    "cu_seqlens_at_eos",
    "documents",
    "heldout_batches",
    "load_tokenizer",
    "prepare",
    "train_bpe",
]
