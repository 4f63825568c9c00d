"""Tokenizer, chat template and detokenizer against the libraries that define them."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from router.chat import ChatTemplate, ChatTemplateError
from router.detokenizer import IncrementalDetokenizer, detokenizers
from router.text import SamplingDefaults, TextCodec
from tests.router.echo import CHAT_TEMPLATE, byte_level_tokenizer, write_model

BYTE_LEVEL = byte_level_tokenizer()
MAKE_BYTE_LEVEL = detokenizers(BYTE_LEVEL)


def sentencepiece_like(*, strip: bool) -> Tokenizer:
    """As Llama 2 (strip) and Gemma: words with "▁", bytes for everything else."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁the", "the", "▁cat", "é", "世", "▁🙂", "a", "b"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")])
    return tokenizer


LLAMA = sentencepiece_like(strip=True)
GEMMA = sentencepiece_like(strip=False)


def texts(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(max_examples=500)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 5), max_size=40))
def test_byte_level_equals_whole_decode(ids: list[int]) -> None:
    assert "".join(texts(MAKE_BYTE_LEVEL(()), ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@settings(max_examples=300)
@given(st.text(max_size=30), st.booleans())
def test_text_comes_back_and_no_character_is_cut(text: str, byte_by_byte: bool) -> None:
    merged = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    ids = [byte_token(byte) for byte in text.encode()] if byte_by_byte else merged
    pieces = texts(MAKE_BYTE_LEVEL(()), ids)
    assert "".join(pieces) == text == BYTE_LEVEL.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_waits_for_the_whole_character_and_no_longer() -> None:
    ids = [byte_token(byte) for byte in "é🙂x".encode()]
    assert texts(MAKE_BYTE_LEVEL(()), ids) == ["", "é", "", "", "", "🙂", "x", ""]


def test_broken_character_is_replaced_once_the_rest_cannot_come() -> None:
    ids = [byte_token(byte) for byte in b"\xf0\x9fA\xe2"]
    assert texts(MAKE_BYTE_LEVEL(()), ids) == ["", "", "\ufffdA", "", "\ufffd"]


def byte_token(byte: int) -> int:
    """The token of one byte. GPT-2's table: printable bytes stand for themselves, the others for chr(256) onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [other for other in range(256) if other not in printable]
    char = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return token_of(BYTE_LEVEL, char)


def token_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def valid_byte_runs(ids: list[int]) -> list[int]:
    """Takes out byte tokens of runs that are not UTF-8 as a whole: the one documented difference."""
    kept: list[int] = []
    run: list[int] = []
    for token_id in [*ids, -1]:
        if 3 <= token_id < 259:
            run.append(token_id)
        elif token_id > 2 or token_id == -1:  # special tokens do not interrupt a run
            if _is_utf8(run):
                kept += run
            run = []
            kept += [token_id] if token_id >= 0 else []
    return kept


def _is_utf8(run: list[int]) -> bool:
    try:
        bytes(token_id - 3 for token_id in run).decode()
    except UnicodeDecodeError:
        return False
    return True


char_bytes = st.text(max_size=3).map(lambda text: [3 + byte for byte in text.encode()])
sentencepiece_ids = st.lists(st.one_of(st.integers(0, 270).map(lambda i: [i]), char_bytes), max_size=15).map(
    lambda runs: [token_id for run in runs for token_id in run]
)


@pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA], ids=["llama", "gemma"])
@settings(max_examples=300)
@given(ids=sentencepiece_ids)
def test_byte_fallback_equals_whole_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = valid_byte_runs(ids)
    assert "".join(texts(detokenizers(tokenizer)(()), ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_byte_fallback_replaces_each_broken_byte() -> None:
    ids = [3 + 0xE2, 3 + 0x82, token_of(LLAMA, "a"), 3 + 0xF0]
    joined = "".join(texts(detokenizers(LLAMA)(()), ids))
    assert joined == LLAMA.decode(ids) == "\ufffd\ufffda\ufffd"


def test_space_before_the_first_word_belongs_to_an_answer_but_not_to_a_text() -> None:
    make, ids = detokenizers(LLAMA), [token_of(LLAMA, "▁cat")]
    assert "".join(texts(make(()), ids)) == "cat"
    assert "".join(texts(make([1]), ids)) == "cat"  # only <s> before it
    assert "".join(texts(make([1, token_of(LLAMA, "▁the")]), ids)) == " cat"


def test_other_decoders_use_a_window() -> None:
    tokenizer = Tokenizer(
        models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, ",": 4}, unk_token="[UNK]")
    )
    tokenizer.decoder = decoders.WordPiece()
    ids = [1, 2, 3, 4, 1, 2] * 20
    pieces = texts(detokenizers(tokenizer)(()), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[:3] == ["the", " cat", "s"]
    assert "".join(texts(detokenizers(tokenizer)([1]), [2])) == " cat"


def test_window_gives_up_on_a_character_that_never_ends() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    broken = [byte_token(0x9F)] * 50
    detokenizer = detokenizers(tokenizer)(())
    pieces = texts(detokenizer, broken)
    assert "".join(pieces) == "\ufffd" * 50
    assert sum(bool(piece) for piece in pieces) > 3


def test_cost_of_a_token_does_not_grow() -> None:
    detokenizer = MAKE_BYTE_LEVEL(())
    ids = BYTE_LEVEL.encode("the quick brown fox 🙂 ").ids * 400

    def pushed_s() -> float:
        start = time.perf_counter()
        for token_id in ids:
            detokenizer.push(token_id)
        return time.perf_counter() - start

    pushed_s()
    early = min(pushed_s() for _ in range(3))
    for _ in range(20):
        pushed_s()
    late = min(pushed_s() for _ in range(3))
    assert late < 3 * early + 0.005


# ---- prompts -----------------------------------------------------------------------------------------------------


def load(path: Path, **files: dict[str, Any]) -> TextCodec:
    return TextCodec.load(write_model(path, byte_level_tokenizer(), **files))


def test_plain_prompt_gets_bos_once_and_chat_has_its_own(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    codec = load(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": template})
    assert codec.encode("fox")[0] == 0
    assert codec.encode("fox").count(0) == 1
    rendered = codec.render_chat([{"role": "user", "content": "fox"}])
    assert codec.encode(rendered, add_special_tokens=False) == codec.encode("fox")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"add_bos_token": True, "bos_token": None},
    ],
)
def test_prompts_tokenize_as_in_transformers(tmp_path: Path, flags: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": CHAT_TEMPLATE,
        **flags,
    }
    codec = load(tmp_path, tokenizer_config=settings)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for text in ("the fox", "", " été 🙂", "<|im_end|>x", "a" * 9000):
        assert codec.encode(text) == reference(text)["input_ids"]
        assert (
            codec.encode(text, add_special_tokens=False)
            == reference(text, add_special_tokens=False)["input_ids"]
        )


TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "whitespace": "{% for m in messages %}\n  {% if loop.first %}\nA\n  {% endif %}\n{{ m.content }}\n{% endfor %}\n",
    "loopcontrols": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
    "specials": "{{ bos_token }}{{ eos_token }}{% if pad_token is defined %}P{% endif %}{% if tools %}T{% endif %}",
    "missing": "{% for m in messages %}{{ 'name' in m }}{{ m.name is defined }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "<b>é</b> & 'x'"},
    {"role": "user", "content": "fox", "name": None},
    {"role": "assistant", "content": "dog\n"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_renders_as_in_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATES[name],
    }
    codec = load(tmp_path, tokenizer_config=settings)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    expected = reference.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert codec.render_chat(CONVERSATION) == expected
    ids = reference.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
    assert codec.encode(expected, add_special_tokens=False) == ids


def test_chat_template_file_wins_and_named_templates_work(tmp_path: Path) -> None:
    message: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load(tmp_path / "named", tokenizer_config={"chat_template": named}).render_chat(message) == "D"
    write_model(tmp_path / "file", byte_level_tokenizer())
    (tmp_path / "file" / "chat_template.jinja").write_text("F")
    assert TextCodec.load(tmp_path / "file").render_chat(message) == "F"


def test_strftime_now() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m') }}", {}, now=lambda: datetime(2024, 5, 1))
    assert template.render([]) == "2024-05"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refused"),
        ("{{ messages[0].content + 1 }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),  # the sandbox
        ("{{ messages.append(1) }}", "refused"),  # immutable
    ],
)
def test_template_errors_are_typed(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_no_template(tmp_path: Path) -> None:
    codec = load(tmp_path, tokenizer_config={})
    assert not codec.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        codec.render_chat([{"role": "user", "content": "x"}])


# ---- what the model's files say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 1}, (7, 8)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 5}, (5,)),
        ({}, {"text_config": {"eos_token_id": 6}}, (6,)),
        ({}, {}, (1,)),  # the tokenizer's </s>
        ({"eos_token_id": 0}, {"eos_token_id": 5}, (0,)),
    ],
)
def test_eos_ids(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert load(tmp_path, generation_config=generation, config=config).eos_ids == expected


def test_sampling_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "a").defaults == SamplingDefaults(1.0, 0, 1.0)
    generation = {"temperature": 0.6, "top_k": -1, "top_p": 0.9}
    assert load(tmp_path / "b", generation_config=generation).defaults == SamplingDefaults(0.6, 0, 0.9)
    generation = {"min_p": 0.1, "repetition_penalty": 1.05}
    assert load(tmp_path / "d", generation_config=generation).defaults == SamplingDefaults(
        min_p=0.1, repetition_penalty=1.05
    )
    assert load(tmp_path / "c", generation_config={"top_k": 20, "temperature": 0}).defaults.top_k == 20


def test_unsupported_defaults_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, generation_config={"no_repeat_ngram_size": 3, "typical_p": 1.0})
    assert "no_repeat_ngram_size not supported" in caplog.text
    assert "typical_p" not in caplog.text


def test_vocab_size(tmp_path: Path) -> None:
    assert load(tmp_path / "a", config={"vocab_size": 600}).vocab_size == 600
    assert load(tmp_path / "b", config={"text_config": {"vocab_size": 601}}).vocab_size == 601
    assert load(tmp_path / "c", config={}).vocab_size == BYTE_LEVEL.get_vocab_size()


def test_tokenizer_files_cannot_cut_or_pad(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    codec = TextCodec.load(write_model(tmp_path, tokenizer))
    assert codec.decode(codec.encode("the quick brown fox")) == "the quick brown fox"
    assert len(codec.encode("fox")) < 64


def test_longest_text_is_a_bound(tmp_path: Path) -> None:
    codec = load(tmp_path)
    limit = codec.longest_text(1)
    assert limit is not None
    assert limit >= max(len(token) for token in BYTE_LEVEL.get_vocab())
    swallowing = byte_level_tokenizer()
    swallowing.add_special_tokens([AddedToken("<eat>", rstrip=True)])
    assert TextCodec.load(write_model(tmp_path / "b", swallowing)).longest_text(1) is None


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TextCodec.load(tmp_path)
    write_model(tmp_path, byte_level_tokenizer())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        TextCodec.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        TextCodec.load(tmp_path)


async def test_long_texts_are_tokenized_off_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    codec = load(tmp_path)
    threads: list[threading.Thread] = []
    encode = codec.encode

    def spying(text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(codec, "encode", spying)
    short, long = "fox", "the quick brown fox " * 1000
    assert await codec.encode_async(short) == encode(short)
    assert await codec.encode_async(long) == encode(long)
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_doors_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, router.http_door, router.grpc_door;"
        "sys.exit(' '.join({'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_post_processor_is_ours_to_replace() -> None:
    # Guards the test model: were bos not added by the post-processor, the doubled-bos test would prove nothing.
    assert isinstance(BYTE_LEVEL.post_processor, processors.TemplateProcessing)
