"""Prompts as users write them: text, JSON lines and chats, and every way of getting one wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_twist.prompts import encode_prompt, parse_prompt, read_prompts

CHAT = [{"role": "user", "content": "A lamp?"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(repo_root: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(repo_root / "models/tiny-reviews")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.json", "prompts.jsonl"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("I bought this\nThe battery\n", ["I bought this", "The battery"]),
        ("I bought this\r\n\r\nThe battery", ["I bought this", "The battery"]),
        ("\n  \n\ufeff I bought \n", ["\ufeff I bought "]),  # a BOM is one at the beginning only
        ("\ufeffI bought\n", ["I bought"]),
        ("{name} said\n[INST] Hi [/INST]\n{\n", ["{name} said", "[INST] Hi [/INST]", "{"]),
        ('"quoted"\n42\nnull\n', ['"quoted"', "42", "null"]),
        ("one\x0bline\u2028still\n", ["one\x0bline\u2028still"]),
        ('{"prompt": "I bought"}\n\n{"prompt": " two\\nlines"}\r\n', ["I bought", " two\nlines"]),
        ('\ufeff  {"prompt": "a\u2028b"}', ["a\u2028b"]),
        ('{"prompt": "{\\"a\\": 1}"}', ['{"a": 1}']),
        (json.dumps({"messages": CHAT}) + '\n{"prompt": ""}', [CHAT, ""]),
    ],
)  # fmt: skip
def test_lines_decide_what_a_file_holds(tmp_path: Path, content: str, expected: list[Any], name: str):
    assert read_prompts(write(tmp_path, content, name)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold a prompt a line, got none: add one"),
        ("\ufeff\r\n \n", "must hold a prompt a line, got none"),
        ("x".encode("utf-16"), "must be text in UTF-8, got other bytes"),
        ('a\n\n{"prompt": "b"}', 'line 3 must be text as line 1 is, got a JSON object .*: write all lines in one way'),
        ('{"prompt": "b"}\na', r"line 2 must be a JSON object as line 1 is, got text \(a\)"),
        ('{"prompt": "b"}\n{"promt": "b"}', r"line 2 must have one key, `prompt` or `messages`, got `promt` \(did you"),
        ('{"prompt": "b", "messages": []}', "line 1 must have one key, .* got `prompt`, `messages`: write"),
        ('{"prompt": "b", "id": 3}', "line 1 must have one key, .* got `prompt`, `id`"),
        ("{}", "line 1 must have one key, `prompt` or `messages`, got none"),
        ('{"prompt": "b"', r"line 1 must be one whole JSON object, got \{\"prompt\": \"b\" \(.*: write"),
        ('[\n{"prompt": "b"},\n]', r"line 1 must be text or a JSON object, got a JSON array \(\[\)"),
        ('["a", "b"]', "line 1 must be text or a JSON object, got a JSON array"),
        ("{prompt: 'b'}", "line 1 must be one whole JSON object"),
        ('{"prompt": 3}', "line 1: `prompt` must be text, got 3"),
        ('{"prompt": "\\ud800"}', "line 1 must hold Unicode text, got half a surrogate pair"),
        ('{"messages": []}', r"line 1: `messages` must be a list of at least one object .*, got \[\]"),
        ('{"messages": "Hi"}', "line 1: `messages` must be a list"),
        ('{"messages": [{"content": "Hi"}]}', "line 1: `messages` must be .* with `role` and `content`"),
        ('{"messages": [["user", "Hi"]]}', "line 1: `messages` must be"),
    ],
)
def test_other_lines_are_named(tmp_path: Path, content: str | bytes, message: str):
    with pytest.raises(ValueError, match=f"`--prompts` .*prompts.txt {message}"):
        read_prompts(write(tmp_path, content))


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(ValueError, match="`--prompts` .* cannot be read .*: check the path"):
        read_prompts(tmp_path)


def test_messages_go_through_the_chat_template(tokenizer: Any):
    ids = encode_prompt(parse_prompt(json.dumps({"messages": CHAT}), "x"), tokenizer)  # type: ignore[arg-type]
    assert tokenizer.decode(ids) == "user: A lamp?\nassistant:"
    assert encode_prompt("A lamp?", tokenizer) == tokenizer("A lamp?").input_ids
    assert encode_prompt((5, 6), tokenizer) == encode_prompt([5, 6], None) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        ([{"role": "judge"}], TEMPLATE, r"got \[\{.*judge.*, on which it fails \(TemplateError: no judges here\)"),
        (CHAT, None, "`prompts` must be texts for a model without a chat template, got messages: pass"),
    ],
)
def test_what_cannot_be_encoded_is_named(tokenizer: Any, monkeypatch, prompt: Any, template: str | None, message: str):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, tokenizer)
    with pytest.raises(ValueError, match="without a chat template"):
        encode_prompt(prompt, None)
