#!/usr/bin/env bash
# xgrammar 0.2.8 and llguidance 1.7.6, the two grammar backends that serving engines offer most, accept different sets of
# strings for one and the same JSON schema, without a warning from either:
#   - {"type": "string", "pattern": "b"}: xgrammar wants the whole string to match (refuses "abc"), llguidance any part of
#     it (accepts "abc"), which is what JSON Schema says.
#   - an object with one property: xgrammar closes it (refuses a second property), llguidance leaves it open, which is
#     what JSON Schema says.
#   - {"type": "array", "uniqueItems": true}: xgrammar drops the keyword (accepts [1,1]), llguidance refuses the schema.
# Seen:
#   {"type": "string", "pattern": "b"} '"abc"': xgrammar False, llguidance True
#   {"type": "object", "properties": {"a": {"type": "integer"}}} '{"a":1,"b":2}': xgrammar False, llguidance True
#   {"type": "array", "items": {"type": "integer"}, "uniqueItems": true} '[1,1]': xgrammar True, llguidance Unimplemented keys: ["uniqueItems"]
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy xgrammar==0.2.8 llguidance==1.7.6
"$folder/venv/bin/python" - <<'P'
import json

import llguidance
import xgrammar

# One token per printable ASCII character, and an end.
CHARACTERS = [chr(code) for code in range(32, 127)]
END = len(CHARACTERS)
info = xgrammar.TokenizerInfo([*CHARACTERS, "<end>"], vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
compiler = xgrammar.GrammarCompiler(info)


class Tokenizer:
    bos_token_id, eos_token_id, special_token_ids = None, END, [END]
    tokens = [character.encode() for character in CHARACTERS] + [b"<end>"]

    def __call__(self, text):
        return [CHARACTERS.index(c) for c in (text.decode() if isinstance(text, bytes) else text)]


tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokenizer()))


def by_xgrammar(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema))
    return matcher.accept_string(text) and matcher.accept_token(END)


def by_llguidance(schema, text):
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema), log_level=0)
    if matcher.get_error():
        return matcher.get_error()
    return all(matcher.consume_token(token) for token in Tokenizer()(text)) and matcher.is_accepting()


def check(schema, text, expected):
    schema = json.dumps(schema)
    seen = by_xgrammar(schema, text), by_llguidance(schema, text)
    print(f"{schema} {text!r}: xgrammar {seen[0]}, llguidance {seen[1]}")
    assert seen == expected, f"this has changed: it was {expected}"


string = {"type": "string", "pattern": "b"}
record = {"type": "object", "properties": {"a": {"type": "integer"}}}
integers = {"type": "array", "items": {"type": "integer"}}
# Where both agree, so that a difference below is one of meaning.
check(string, '"b"', (True, True))
check(string, '"c"', (False, False))
check(record, '{"a":1}', (True, True))
check(integers, "[1,1]", (True, True))
# Where they do not.
check(string, '"abc"', (False, True))
check(record, '{"a":1,"b":2}', (False, True))
check({**integers, "uniqueItems": True}, "[1,1]", (True, 'Unimplemented keys: ["uniqueItems"]'))
P
