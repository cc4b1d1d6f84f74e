"""Special tokens, chat templates, conversations, and vocabularies that are smaller than the embedding."""

import json
import shutil

import pytest
import torch

from anymamba import MambaConfig, MambaLM, SamplingConfig
from anymamba.cli import talk
from anymamba.data import ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from anymamba.errors import AnymambaError
from anymamba.generate import generate
from anymamba.train.runs import load_run

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FUSSY = """{%- for message in messages -%}
  {%- if message.role not in ["system", "user", "assistant"] -%}
    {{ raise_exception("no role " ~ message.role) }}
  {%- endif -%}
  {%- if loop.first %}{{ bos_token }}{% endif -%}
  [{{ message.role | upper }}] {{ message.content | trim | tojson }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[ASSISTANT] {% endif %}{{ missing }}"""
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <b>naïve</b> 'q' 🐍 "},
        {"role": "assistant", "content": "yes\n"}, {"role": "user", "content": "why?"}]  # fmt: skip
GREEDY = ("--greedy", "--max-new-tokens", 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as they are published: a BPE of 280 tokens, chat tokens, and the files beside it."""
    folder = tmp_path_factory.mktemp("model")
    train_bpe(["the cat sat on the mat, user and assistant said\n" * 40], 280, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    first = len(content["model"]["vocab"])
    for i, name in enumerate(("<|im_start|>", "<|im_end|>")):
        content["added_tokens"].append({**content["added_tokens"][0], "id": first + i, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first + 1, 0]}))
    torch.manual_seed(0)
    size = load_tokenizer(folder).vocab_size
    MambaLM(MambaConfig(vocab_size=size, d_model=32, n_layer=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refused(command, *arguments, **options):
    code, _, errors = command(*arguments, **options)
    assert code == 2
    return errors


# ---- special tokens ----


def test_what_ends_a_text(folder, copy):
    plain, im_end = load_tokenizer(folder), load_tokenizer(folder).vocab_size - 1
    assert (plain.eos_id, plain.eos_ids) == (im_end, (im_end, 0))
    assert plain.special.tokens == {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    (copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(copy).eos_ids == (im_end, 5)
    (copy / "tokenizer_config.json").unlink()
    assert load_tokenizer(copy).eos_ids == (5,)
    (copy / "generation_config.json").unlink()
    (copy / "special_tokens_map.json").write_text('{"eos_token": "<|im_start|>"}')
    assert load_tokenizer(copy).eos_ids == (im_end - 1,)
    (copy / "special_tokens_map.json").unlink()
    assert load_tokenizer(copy).eos_ids == (0,)  # <|endoftext|>, by its name
    (copy / "chat_template.jinja").write_text("hello")
    assert load_tokenizer(copy).chat([]) == "hello"
    assert ByteTokenizer().eos_ids == (256,)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "holds a list, but must hold an object"),
        ("tokenizer_config.json", '{"eos_token": "</none>"}', "'</none>' and the ids .* has no such token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is a int, but must be text"),
        ("generation_config.json", '{"eos_token_id": 9999}', r"the ids \[9999\] end a text, but its vocabulary of"),
        ("generation_config.json", '{"eos_token_id": "x"}', r"eos_token_id=\['x'\].*must be token ids"),
    ],
)
def test_damaged_files_beside_it(copy, name, text, why):
    (copy / name).write_text(text)
    with pytest.raises(AnymambaError, match=why):
        load_tokenizer(copy)


def test_saved_with_all_that_belongs_to_it(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    for _ in range(2):
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert (again.fingerprint, again.eos_ids) == (tokenizer.fingerprint, tokenizer.eos_ids)
        assert again.chat(TALK) == tokenizer.chat(TALK)
        ByteTokenizer().save(tmp_path)  # whose folder then says nothing of the other one
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


# ---- templates ----


@pytest.mark.parametrize("template", [CHATML, FUSSY])
@pytest.mark.parametrize("prompted", [True, False])
def test_text_is_that_of_transformers(folder, copy, template, prompted):
    from transformers import PreTrainedTokenizerFast

    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>",
                                     bos_token="<|endoftext|>", chat_template=template)  # fmt: skip
    ours = load_tokenizer(copy)
    want = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompted)
    assert ours.chat(TALK, add_generation_prompt=prompted) == want
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=prompted, return_dict=False)
    assert ours.encode(want).tolist() == ids
    assert ours.decode(ids, special=True) == want


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}", "cannot be filled in line 1: Unexpected end of template"),
        ("{{ messages[99].content.strip() }}", "cannot be filled: .* has no"),
        ("{{ raise_exception('roles must alternate') }}", "cannot be filled: roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be filled: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "cannot be filled: access to attribute 'append' of 'list' object is unsafe"),
        ("{{ 1 // 0 }}", "cannot be filled: .* by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be filled: maximum recursion"),
    ],
)
def test_broken_templates(copy, template, why):
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(AnymambaError, match=f"{why}.*--no-chat"):
        load_tokenizer(copy).chat(TALK)


def test_messages_and_tokenizers_that_cannot_chat(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    for messages in ("hi", ["hi"], [{"role": "user"}], [{"content": "x"}], {"role": "user", "content": "x"}):
        with pytest.raises(AnymambaError, match=r'they are a list of \{"role"'):
            tokenizer.chat(messages)
    for other in (ByteTokenizer(), train_bpe(["ab"] * 9, 257, tmp_path)):
        with pytest.raises(AnymambaError, match=r"has no chat template: .* put a chat_template.jinja beside"):
            other.chat(TALK)


# ---- conversations ----


def conversation(model, tokenizer, lines, *, system=(), count=9, first=None):
    """What is said when the whole conversation is read anew for each answer."""
    messages, said = list(system), []
    for line in lines:
        messages.append({"role": "user", "content": line})
        ids = tokenizer.encode(tokenizer.chat(messages)).tolist()
        done = generate(model, [ids], max_new_tokens=count, sampling=SamplingConfig(temperature=0), state=first,
                        tokenizer=tokenizer, stop_ids=tokenizer.eos_ids)[0]  # fmt: skip
        said.append(done.text)
        messages.append({"role": "assistant", "content": done.text})
    return "".join(f"> {text}\n" for text in said) + "> \n"


def test_a_conversation_goes_on_from_its_state(folder, command, monkeypatch):
    model, tokenizer = load_run(folder)
    read, real = [], talk.stream
    monkeypatch.setattr(talk, "stream", lambda model, ids, **options: read.append(ids) or real(model, ids, **options))
    code, out, errors = command("generate", folder, "--interactive", *GREEDY, "--system", "the mat", stdin="hi\nwhy\n")
    assert code == 0, errors
    assert out == conversation(model, tokenizer, ["hi", "why"], system=[{"role": "system", "content": "the mat"}])
    assert tokenizer.decode(read[0], special=True).startswith("<|im_start|>system\nthe mat<|im_end|>\n")
    assert tokenizer.decode(read[1], special=True).endswith(
        "\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(read[1]) < len(read[0])  # the first turn was not read again


def test_a_template_that_changes_what_was_said_is_read_from_the_start(copy, command):
    shorter = CHATML.replace("message['content']", "message['content'][:3]")
    (copy / "chat_template.jinja").write_text(shorter)
    out = command("generate", copy, "--interactive", *GREEDY, stdin="hi\nwhy\n")[1]
    assert out == conversation(*load_run(copy), ["hi", "why"])


def test_an_end_of_turn_is_read_once(copy):
    """An answer that the model itself ends: its state has read the end, and the next turn goes on behind it."""
    end = {"eos_token": "<|endoftext|>", "chat_template": CHATML.replace("<|im_end|>", "<|endoftext|>")}
    (copy / "tokenizer_config.json").write_text(json.dumps(end))
    model, tokenizer = load_run(copy)
    torch.nn.init.zeros_(model.backbone.norm_f.weight)  # all logits are 0, and the first id wins: <|endoftext|>
    turns = talk.Chat(tokenizer, None, None)
    ids, before = turns.ask("hi")
    done = generate(model, [ids], sampling=SamplingConfig(temperature=0), tokenizer=tokenizer, stop_ids=[0])[0]
    assert (before, done.ids, done.text) == (None, [0], "")
    turns.answered(done.ids, done.text, done.state)
    ids, before = turns.ask("why")
    assert before is done.state
    assert tokenizer.decode(ids, special=True).startswith("\n<|im_start|>user\nwhy<|endoftext|>")


def test_without_the_template(folder, command):
    out = command("generate", folder, "--interactive", *GREEDY, "--no-chat", stdin="hi\n")[1]
    model, tokenizer = load_run(folder)
    done = generate(model, [tokenizer.encode("hi\n").tolist()], max_new_tokens=9, tokenizer=tokenizer,
                    sampling=SamplingConfig(temperature=0), stop_ids=tokenizer.eos_ids)[0]  # fmt: skip
    assert out == f"> {done.text}\n> \n"
    assert "--no-chat goes without one: drop --system" in refused(
        command, "generate", folder, "--interactive", "--no-chat", "--system", "x", stdin=""
    )
    assert "the tokenizer 'bytes' has no one: drop --system" in refused(
        command, "generate", "--interactive", "--system", "x", stdin=""
    )
    assert "add --interactive" in refused(command, "generate", folder, "--system", "x")


# ---- vocabularies ----


def test_rows_without_a_token_are_never_sampled(folder, tmp_path):
    """Published models count the padding as vocabulary."""
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(1)
    model = MambaLM(MambaConfig(vocab_size=512, d_model=32, n_layer=2, tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 30
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    cut, _ = load_run(tmp_path)
    assert (cut.config.vocab_size, cut.config.padded_vocab_size) == (tokenizer.vocab_size, 512)
    assert cut.fingerprint() == model.fingerprint()  # they share their states
    wild = generate(model, [[1, 2]], max_new_tokens=64, n=2)
    tame = generate(cut, [[1, 2]], max_new_tokens=64, n=2)
    assert max(max(done.ids) for done in wild) >= tokenizer.vocab_size > max(max(done.ids) for done in tame)
    with pytest.raises(AnymambaError, match=r"has 257 tokens and the model .* knows 512: give the model's own"):
        load_run(tmp_path, "bytes")
    small = MambaLM(MambaConfig(vocab_size=200, d_model=32, n_layer=2))
    small.save_pretrained(tmp_path)
    with pytest.raises(AnymambaError, match=f"has {tokenizer.vocab_size} tokens and the model .* knows 200"):
        load_run(tmp_path)


# ---- the Hub ----


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """The cache of huggingface_hub with one model in it, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    for revision in ("main", "v2"):
        (tmp_path / "models--owner--name" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--owner--name" / "refs" / revision).write_text(commit)
    return snapshot


def test_a_name_on_the_hub(cache, folder):
    for name in ("owner/name", "owner/name@v2"):
        tokenizer = load_tokenizer(name)
        assert isinstance(tokenizer, JsonTokenizer)
        assert tokenizer.fingerprint == load_tokenizer(folder).fingerprint
        assert tokenizer.chat(TALK) == load_tokenizer(folder).chat(TALK)


def test_names_that_the_hub_does_not_give(cache, tmp_path, monkeypatch):
    for name in ("owner/other", "owner/name@v3"):
        with pytest.raises(AnymambaError, match=f"no folder {name.partition('@')[0]} here, .* HF_HUB_OFFLINE"):
            load_tokenizer(name)
    (cache / "tokenizer.json").unlink()
    with pytest.raises(AnymambaError, match=r"owner/name has no tokenizer.json on the Hub .*gpt-neox-20b"):
        load_tokenizer("owner/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(AnymambaError, match="no tokenizer at runs/name;"):  # a slip in a path asks nobody
        load_tokenizer("runs/name")
