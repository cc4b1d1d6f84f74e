"""Corpora, tokens on disk, batches."""

import errno
import gzip
import json
import lzma
import os
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.data import Batches, ByteTokenizer, cu_seqlens_at_eos, documents, heldout_batches, prepare, tokens
from anymamba.data.corpus import PIECE_BYTES
from anymamba.errors import AnymambaError
from shared_data import shared

BYTES = ByteTokenizer()


def read(*paths, **options) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in documents(list(paths), **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, *records) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# Corpora.


def test_without_paths_it_is_the_standard_library():
    texts = {document.name: document.text for document in documents(None)}
    assert len(texts) > 300
    assert list(texts) == sorted(texts, key=lambda name: Path(name).parts)
    assert texts["json/decoder.py"] == Path(json.decoder.__file__).read_bytes().decode()
    assert not any("site-packages" in name or "/test" in name or "__pycache__" in name for name in texts)


def test_a_folder_in_order_without_what_is_hidden_or_binary(tmp_path):
    write(tmp_path / "b.txt", "second\r\n")
    write(tmp_path / "a" / "deep.md", "first")
    write(tmp_path / "c.txt.gz", gzip.compress("third é".encode()))
    write(tmp_path / "d.xz", lzma.compress(b"\xef\xbb\xbffourth"))
    jsonl(tmp_path / "e.jsonl", {"text": "fifth"}, {"text": ""}, {"text": "sixth \ud800"})
    for hidden in (".git/config", "__pycache__/m.txt", ".env"):
        write(tmp_path / hidden, "hidden")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "image.png", b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.warns(UserWarning, match=r"skipped 1 of 7 files that are not UTF-8 text: .*image\.png"):
        found = read(tmp_path)
    assert [text for _, text in found] == ["first", "second\n", "third é", "fourth", "fifth", "sixth \ufffd"]
    assert found[-1][0] == f"{tmp_path / 'e.jsonl'}:3"
    assert read(tmp_path / "b.txt", tmp_path / "a") == [found[1], found[0]]
    assert read(tmp_path / "b.txt", tmp_path / "a" / ".." / "b.txt") == [found[1]], "one file is read once"


def test_real_books_and_jsonl():
    name, text = read(shared("gutenberg/pride_and_prejudice.txt.xz"))[0]
    assert name.endswith("pride_and_prejudice.txt.xz")
    assert "It is a truth universally acknowledged" in text
    lambada = read(shared("lambada/lambada_test.jsonl.xz"))
    assert len(lambada) == 5153


def test_cr_lf_is_lf(tmp_path):
    """Wherever the pieces end; a CR by itself, and what a JSON string spells, stay."""
    body = b"a" * (PIECE_BYTES + 4095)  # the first piece ends in the CR that follows
    for text in (b"one\r\ntwo\r\r\nthree\rfour\r", body + b"\r\nb", body + b"\rb", b"\r", b"\r\n"):
        [(_, found)] = read(write(tmp_path / "text.txt", text))
        assert found.encode() == text.replace(b"\r\n", b"\n")
    jsonl(tmp_path / "text.jsonl", {"text": "one\r\ntwo"})
    assert read(tmp_path / "text.jsonl")[0][1] == "one\r\ntwo"


def test_a_large_file_is_one_document_in_pieces(tmp_path):
    text = "äöü€🐍" * PIECE_BYTES + "\nend"  # 13 bytes, so that pieces end within characters
    path = write(tmp_path / "large.txt", text)
    (document,) = documents([path])
    tracemalloc.start()
    length = sum(len(piece) for piece in document.pieces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == len(text)
    assert peak < path.stat().st_size
    assert next(iter(documents([path]))).text == text


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "body": ["one", None, "three"]}), path)
    assert read(path, field="body") == [(f"{path}:1", "one"), (f"{path}:3", "three")]
    with pytest.raises(AnymambaError, match=r"no column 'text'; the columns are 'id', 'body': choose one with field="):
        read(path)
    with pytest.raises(AnymambaError, match=r"column 'id' holds int64, not text"):
        read(path, field="id")
    with pytest.raises(AnymambaError, match="not a Parquet file"):
        read(write(tmp_path / "bad.parquet", "no table"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(AnymambaError, match=r"needs pyarrow: pip install 'anymamba\[data\]'"):
        read(write(tmp_path / "rows.parquet", "PAR1"))


def test_paths_that_are_not_there_or_hold_nothing(tmp_path):
    write(tmp_path / "shakespeare.txt", "text")
    with pytest.raises(AnymambaError, match=r"no such file or folder; did you mean .*shakespeare\.txt\?"):
        documents([tmp_path / "shakespear.txt"])  # before anything is read
    with pytest.raises(AnymambaError, match="no such file or folder; check the spelling; the folder now is"):
        documents(["nowhere/at/all"])
    with pytest.raises(AnymambaError, match="no paths given"):
        documents([])
    with pytest.raises(AnymambaError, match="the file is empty; give a file with text"):
        documents([write(tmp_path / "empty.txt", "")])
    (tmp_path / "bare").mkdir()
    with pytest.raises(AnymambaError, match="the folder holds no files"):
        documents([tmp_path / "bare"])
    write(tmp_path / "bare" / "empty.txt", "")
    with pytest.raises(AnymambaError, match="bare: no text in 1 files"):
        read(tmp_path / "bare")
    with pytest.raises(AnymambaError, match=r"no text in it \(field 'text'\)"):
        read(jsonl(tmp_path / "blank.jsonl", {"text": ""}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_a_pipe_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AnymambaError, match="neither a file nor a folder"):
        documents([tmp_path / "pipe"])


def test_binary_named_as_text(tmp_path):
    with pytest.raises(AnymambaError, match=r"latin\.txt: byte 0xe9 at offset 3 is not UTF-8 text.*iconv"):
        read(write(tmp_path / "latin.txt", "café".encode("latin1")))
    with pytest.raises(AnymambaError, match=r"byte 0xff at offset 5 is not UTF-8"):
        read(write(tmp_path / "marked.txt", b"\xef\xbb\xbfab\xff"))
    with pytest.raises(AnymambaError, match=r"byte 0xc3 at offset 2 is not UTF-8"):
        read(write(tmp_path / "cut.txt", b"ab\xc3"))
    with pytest.raises(AnymambaError, match=r"a NUL byte at offset 2, so this is no UTF-8 text"):
        read(write(tmp_path / "weights.bin", b"ab\0\0"))
    late = write(tmp_path / "late" / "late.txt", b"a" * (PIECE_BYTES + 9000) + b"\xff")
    with pytest.raises(AnymambaError, match=rf"byte 0xff at offset {PIECE_BYTES + 9000} is not UTF-8"):
        read(late.parent)  # too late to skip it: a part was handed out


def test_damaged_archives(tmp_path):
    for name, data in {"a.gz": gzip.compress(b"text" * 99)[:-9], "b.xz": b"no archive", "c.gz": b"none"}.items():
        with pytest.raises(AnymambaError, match=rf"{name}: damaged or cut-off \.(gz|xz) file .*get it again"):
            read(write(tmp_path / name, data))


def test_unreadable_files(tmp_path, monkeypatch):
    path = write(tmp_path / "secret.txt", "text")

    def refuse(name, *args):  # the superuser may read whatever its mode says
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(AnymambaError, match=r"secret\.txt: permission denied; make it readable .*chmod u\+r"):
        read(path)
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(AnymambaError, match="permission denied"):
        documents([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"lines\.jsonl:2: not JSON \(.*one whole object on each line"),
        (b'["text"]', r'lines\.jsonl:2: a list, but each line must be an object such as \{"text": …\}'),
        (b'{"body": "x", "id": 1}', r"lines\.jsonl:2: no field 'text'; the fields are 'body', 'id': choose"),
        (b'{"text": 7}', r"lines\.jsonl:2: field 'text' is a int, not text; the fields are 'text'"),
        (b'{"text": "\xff"}', r"lines\.jsonl:2: byte 0xff at offset 10 of the line is not UTF-8"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    with pytest.raises(AnymambaError, match=message):
        read(write(tmp_path / "lines.jsonl", b'{"text": "fine"}\n' + line))


# Tokens on disk.


def test_one_document_holds_out_its_end(tmp_path):
    path = shared("tinyshakespeare/input.txt")
    text = path.read_bytes()
    data = prepare([path], BYTES, tmp_path, progress=False)
    assert (len(data.train), len(data.heldout)) == (1003854, 111540)  # the split that everyone uses
    assert (data.train_bytes, data.heldout_bytes) == (1003854, 111540)
    assert bytes(np.concatenate([data.train, data.heldout]).astype(np.uint8)) == text
    assert (data.train.dtype, data.vocab_size, data.eos_id) == (np.uint16, 257, 256)


def test_the_cut_is_between_characters_wherever_the_pieces_end(tmp_path):
    text = "é\n" * PIECE_BYTES
    data = prepare([write(tmp_path / "a.txt", text)], BYTES, tmp_path / "tokens", holdout=0.5)
    assert BYTES.decode(data.train) == BYTES.decode(data.heldout) == text[:PIECE_BYTES]
    assert data.heldout_bytes == len(data.heldout) == len(text.encode()) // 2


def split_of(data) -> tuple[set[str], set[str]]:
    def texts(part):
        assert part[-1] == 256
        return {BYTES.decode(ids) for ids in np.split(part, np.flatnonzero(part == 256) + 1)[:-1]}

    return texts(data.train), texts(data.heldout)


@pytest.mark.parametrize(("count", "holdout"), [(2, 0.1), (2, 0.9), (10, 0.1), (3000, 0.2)])
def test_many_documents_hold_out_whole_ones(tmp_path, count, holdout):
    texts = [f"document {i}" for i in range(count)]
    path = jsonl(tmp_path / "many.jsonl", *({"body": text} for text in texts))
    data = prepare([path], BYTES, tmp_path / "a", field="body", holdout=holdout)
    train, heldout = split_of(data)
    assert train | heldout == set(texts)
    assert not train & heldout
    assert abs(len(heldout) - min(max(count * holdout, 1), count - 1)) <= 0.02 * count
    assert (data.train_bytes, data.heldout_bytes) == (sum(map(len, train)), sum(map(len, heldout)))
    again = prepare([path], BYTES, tmp_path / "b", field="body", holdout=holdout)
    assert split_of(again) == (train, heldout)
    if count > 10:
        other = prepare([path], BYTES, tmp_path / "c", field="body", holdout=holdout, seed=1)
        assert split_of(other) != (train, heldout)


def test_the_standard_library_is_tokenised_once(tmp_path, monkeypatch):
    data = prepare(None, BYTES, tmp_path)
    total = data.train_bytes + data.heldout_bytes
    assert total > 5e6
    assert 0.05 < data.heldout_bytes / total < 0.2
    monkeypatch.setattr(tokens, "_write_parts", lambda *_: pytest.fail("tokenised again"))
    again = prepare(None, BYTES, tmp_path)
    assert np.array_equal(again.heldout, data.heldout)
    assert (again.train_bytes, again.eos_id) == (data.train_bytes, data.eos_id)


class Marked(ByteTokenizer):
    """Another tokenizer with a vocabulary of the same size."""

    fingerprint = "marked"

    def encode(self, text):
        return np.append(super().encode(text), np.uint16(0))


def test_tokens_are_made_again_when_anything_changed(tmp_path):
    path = write(tmp_path / "a.txt", "0123456789" * 10)
    folder = tmp_path / "tokens"
    assert len(prepare([path], BYTES, folder).train) == 90
    write(path, "0123456789" * 20)
    assert len(prepare([path], BYTES, folder).train) == 180
    assert len(prepare([path], BYTES, folder, holdout=0.5).train) == 100
    assert len(prepare([path], Marked(), folder, holdout=0.5).train) == 101
    assert len(prepare([path], BYTES, folder, holdout=0.5).train) == 100
    (folder / "heldout.bin").write_bytes(b"xx")  # cut off by hand, or by a full disk elsewhere
    assert len(prepare([path], BYTES, folder, holdout=0.5).heldout) == 100
    (folder / "tokens.json").write_text("{")
    assert len(prepare([path], BYTES, folder, holdout=0.5).heldout) == 100
    assert sorted(file.name for file in folder.iterdir()) == ["heldout.bin", "tokens.json", "train.bin"]


def test_a_failure_midway_leaves_the_old_tokens_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "0123456789" * 10)
    folder = tmp_path / "tokens"
    prepare([path], BYTES, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BYTES, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], BYTES, folder, seed=5)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_killed_between_two_files_is_not_taken_for_whole(tmp_path, monkeypatch, moved):
    path = write(tmp_path / "a.txt", "0123456789" * 10)
    folder = tmp_path / "tokens"
    prepare([path], BYTES, folder)
    write(path, "abcdefghij" * 10)  # of the same length: only the order of writing can protect it
    move, calls = os.replace, []

    def killed(source, target):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(target)
        move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], BYTES, folder)
    monkeypatch.undo()
    assert not (folder / "tokens.json").exists()
    assert BYTES.decode(prepare([path], BYTES, folder).train) == "abcdefghij" * 9


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux")
def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_create", lambda _: Path("/dev/full").open("wb"))  # noqa: SIM115
    with pytest.raises(AnymambaError, match=r"the disk is full, and nothing half-written was left.*free some space"):
        prepare([write(tmp_path / "a.txt", "text" * 9999)], BYTES, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").iterdir())


def test_what_prepare_refuses(tmp_path):
    path = write(tmp_path / "a.txt", "tiny")
    with pytest.raises(AnymambaError, match=r"too short: 3 tokens to train on and 1 held out \(holdout=0\.1\)"):
        prepare([path], BYTES, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").iterdir())
    with pytest.raises(AnymambaError, match=r"holdout=1\.5, but it is a fraction between 0 and 1"):
        prepare([path], BYTES, tmp_path / "tokens", holdout=1.5)
    with pytest.raises(AnymambaError, match=r"a\.txt: cannot write there .*choose another folder"):
        prepare([path], BYTES, path)


def test_progress_is_quiet_on_short_work(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([write(tmp_path / "a.txt", "text" * 99)], BYTES, tmp_path / "tokens", progress=True)
    assert capfd.readouterr() == ("", "")


# Batches.

anytime = settings(deadline=None)  # slow machines are no failures
sizes = {"n": st.integers(2, 300), "batch_size": st.integers(1, 7), "seqlen": st.integers(1, 40)}
seeds = st.integers(0, 2**32 - 1)


def batches(n, batch_size, seqlen, **options) -> Batches | None:
    """Over 0, 1, …, n − 1, so that an id is its place; None where there are too few."""
    needed = (batch_size if options.get("carry") else 1) * seqlen + 1
    return Batches(np.arange(n, dtype=np.uint16), batch_size, seqlen, **options) if n >= needed else None


@anytime
@given(**sizes, seed=seeds, step=st.integers(0, 500), carry=st.booleans())
def test_a_step_is_the_same_in_any_run_and_labels_are_the_next_ids(n, batch_size, seqlen, seed, step, carry):
    run = batches(n, batch_size, seqlen, seed=seed, carry=carry)
    if run is None:
        return
    for earlier in range(max(step - 3, 0), step):
        run.batch(earlier)
    ids, labels = run.batch(step)
    assert ids.shape == labels.shape == (batch_size, seqlen)
    assert ids.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, ids + 1)
    resumed = batches(n, batch_size, seqlen, seed=seed, carry=carry)
    assert all(map(torch.equal, resumed.batch(step), (ids, labels)))


@anytime
@given(**sizes, seed=seeds)
def test_an_epoch_takes_each_window_once(n, batch_size, seqlen, seed):
    run = batches(n, 1, seqlen, seed=seed)
    if run is None:
        return
    for epoch in range(2):
        steps = range(epoch * run.steps_per_epoch, (epoch + 1) * run.steps_per_epoch)
        seen = torch.cat([run.batch(step)[0] for step in steps]).reshape(-1)
        assert len(seen) == len(seen.unique()) > n - 1 - 2 * seqlen
        assert seen.max() - seen.min() == len(seen) - 1  # no gaps


def test_epochs_differ_in_order_and_offset():
    run = batches(1010, 5, 10)
    assert run.steps_per_epoch == 20
    first, second = (torch.cat([run.batch(step)[0][:, 0] for step in range(k * 20, k * 20 + 20)]) for k in (0, 1))
    assert first.min() != second.min()
    assert not torch.equal(first - first.min(), second - second.min())


@anytime
@given(**sizes, seed=seeds)
def test_carried_rows_read_on_where_they_stopped(n, batch_size, seqlen, seed):
    run = batches(n, batch_size, seqlen, seed=seed, carry=True)
    if run is None:
        return
    steps = run.steps_per_epoch
    for epoch in range(2):
        read = torch.cat([run.batch(step)[0] for step in range(epoch * steps, (epoch + 1) * steps)], dim=1)
        assert torch.equal(read - read[:, :1], torch.arange(steps * seqlen).expand(batch_size, -1))
        assert len(read.unique()) == read.numel()  # no row reads what another reads
    fresh = [step for step in range(3 * steps) if run.starts_fresh(step)]
    assert fresh == [0, steps, 2 * steps]


def test_windows_that_are_not_carried_always_start_fresh():
    assert all(batches(100, 2, 10).starts_fresh(step) for step in range(20))


def test_batches_of_real_text(tmp_path):
    data = prepare([shared("tinyshakespeare/input.txt")], BYTES, tmp_path)
    text = BYTES.decode(data.train)
    for row in Batches(data.train, 4, 300).batch(7)[0]:
        assert BYTES.decode(row) in text


def test_what_batches_refuse():
    with pytest.raises(AnymambaError, match=r"10 tokens, but seqlen=10 needs at least 11 .*smaller seqlen"):
        Batches(np.arange(10), 4, 10)
    with pytest.raises(AnymambaError, match=r"20 tokens, but batch_size=4 rows of seqlen=5 in a row needs at least 21"):
        Batches(np.arange(20), 4, 5, carry=True)
    with pytest.raises(AnymambaError, match="batch_size=0, but it must be at least 1"):
        Batches(np.arange(20), 0, 5)
    with pytest.raises(AnymambaError, match="seed=-1, but it must be from 0"):
        Batches(np.arange(20), 1, 5, seed=-1)
    with pytest.raises(AnymambaError, match="step=-1, but steps count from 0"):
        Batches(np.arange(20), 1, 5).batch(-1)


@anytime
@given(**sizes, max_tokens=st.none() | st.integers(1, 400))
def test_heldout_windows(n, batch_size, seqlen, max_tokens):
    found = list(heldout_batches(np.arange(n), batch_size, seqlen, max_tokens))
    rows = torch.cat([ids for ids, _ in found])
    assert all(torch.equal(labels, ids + 1) and len(ids) <= batch_size for ids, labels in found)
    assert len(rows.unique()) == rows.numel()
    windows = (n - 1) // rows.shape[1]
    assert len(rows) == (windows if max_tokens is None else min(windows, max(1, max_tokens // rows.shape[1])))
    assert rows[0, 0] == 0
    if len(rows) > 1:
        assert rows[-1, 0] == (windows - 1) * rows.shape[1]  # from the start to the end


def test_what_heldout_refuses():
    with pytest.raises(AnymambaError, match="1 tokens, but a label needs at least 2"):
        heldout_batches(np.arange(1), 1, 8)
    with pytest.raises(AnymambaError, match="seqlen=0, but it must be at least 1"):
        heldout_batches(np.arange(9), 1, 0)


def test_boundaries_at_eos():
    ids = torch.tensor([[5, 9, 5, 9], [9, 5, 5, 5]])
    found = cu_seqlens_at_eos(ids, eos_id=9)
    assert found.dtype == torch.int32
    assert found.tolist() == [0, 2, 4, 5, 8]
    assert cu_seqlens_at_eos(ids, eos_id=None).tolist() == [0, 4, 8]
    with pytest.raises(AnymambaError, match=r"ids have shape \(4,\), but must be \(batch, seqlen\)"):
        cu_seqlens_at_eos(ids[0], 9)
