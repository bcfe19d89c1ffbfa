"""Prompts as users write them: a file with one a line, as text, JSON or chat messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_twist.config import did_you_mean

#: A text, token ids, or the messages of a chat, each with ``role`` and ``content``.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

KINDS = ("prompt", "messages")
#: What begins like this was meant to be a JSON object; "{name} said" was not.
_OBJECT = re.compile(r"""\s*\{\s*(["'}]|(prompt|messages)\s*:)""")
_REMEDY = (
    'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, and a text that looks like JSON as '
    "the value of `prompt`"
)


def read_prompts(path: str | Path) -> list[str | list[dict[str, Any]]]:
    """Return the prompts of a file in UTF-8, one a line; blank lines are left out.

    Either every line is text, which is taken as it stands, or every line is a JSON object:
    ``{"prompt": "..."}`` or ``{"messages": [...]}``. The lines decide, not the name of the file.

    Raises:
        ValueError: a file that cannot be read or holds no prompt, a line that looks like JSON but is neither
            of these, or text and JSON in one file; the message names the line.
    """
    where = f"`--prompts` {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error}): check the path.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} must be text in UTF-8, got other bytes ({error}): convert it.") from error
    prompts: list[str | list[dict[str, Any]]] = []
    first: tuple[int, bool] | None = None
    # Not splitlines(), which also splits at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        prompts.append(parse_prompt(line, f"{where} line {number}"))
        is_json = _OBJECT.match(line) is not None
        first = first or (number, is_json)
        if is_json != first[1]:
            kinds = {True: "a JSON object", False: "text"}
            raise ValueError(
                f"{where} line {number} must be {kinds[first[1]]} as line {first[0]} is, got {kinds[is_json]} "
                f"({_short(line)}): write all lines in one way; a text becomes {{\"prompt\": \"...\"}}."
            )
    if not prompts:
        raise ValueError(f"{where} must hold a prompt a line, got none: add one.")
    return prompts


def parse_prompt(line: str, where: str) -> str | list[dict[str, Any]]:
    """Return the prompt that a line holds: the text itself, that of its JSON object, or its chat messages.

    Raises:
        ValueError: the line looks like JSON, but is no such object; ``where`` names it.
    """
    if not _OBJECT.match(line):
        if line.lstrip().startswith("[") and isinstance(_parsed(line), list | None):
            raise ValueError(f"{where} must be text or a JSON object, got a JSON array ({_short(line)}): {_REMEDY}.")
        return line
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where} must be one whole JSON object, got {_short(line)} ({error}): {_REMEDY}."
        ) from error
    unknown = [key for key in fields if key not in KINDS]
    if unknown or len(fields) != 1:
        hint = did_you_mean(unknown[0], KINDS) if unknown else ""
        got = ", ".join(f"`{key}`" for key in fields) or "none"
        raise ValueError(f"{where} must have one key, `prompt` or `messages`, got {got}{hint}: {_REMEDY}.")
    if "prompt" in fields:
        prompt = fields["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: `prompt` must be text, got {_short(json.dumps(prompt))}: {_REMEDY}.")
    else:
        prompt = fields["messages"]
        if (
            not isinstance(prompt, list)
            or not prompt
            or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
        ):
            raise ValueError(
                f"{where}: `messages` must be a list of at least one object with `role` and `content`, got "
                f"{_short(json.dumps(prompt))}: {_REMEDY}."
            )
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must hold Unicode text, got half a surrogate pair ({error}): remove it.") from error
    return prompt


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt: messages through the tokenizer's chat template, for the model to answer.

    Raises:
        ValueError: the tokenizer or its template is missing, or the template refuses the messages.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("`prompts` must be token ids, got text but no tokenizer: pass `tokenizer`.")
        return list(tokenizer(prompt).input_ids)
    if len(prompt) and isinstance(prompt[0], Mapping):
        return _chat(prompt, tokenizer)
    return list(prompt)  # type: ignore[arg-type]


def _chat(messages: Any, tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "`prompts` must be texts for a model without a chat template, got messages: pass {\"prompt\": \"...\"}, or "
            "a model that was made for chats."
        )
    from jinja2 import TemplateError

    try:
        return list(
            tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(
            f"`prompts` must be messages that the model's chat template takes, got {_short(json.dumps(messages))}, on "
            f"which it fails ({type(error).__name__}: {error}): change the messages as it says."
        ) from error


def _parsed(line: str) -> Any:
    """Return the JSON value of a line; None for a lone bracket, the first line of an array; else the line."""
    if line.strip() == "[":
        return None
    try:
        return json.loads(line)
    except ValueError:
        return line


def _short(text: str, most: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= most else f"{text[:most]}..."
