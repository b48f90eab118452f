"""Files of conversations: JSON in the shapes that people have, each record checked.

    {"instruction": "…", "input": "", "output": "…"}             Alpaca
    {"messages": [{"role": "user", "content": "…"}, …]}          OpenAI, TRL
    {"conversations": [{"from": "human", "value": "…"}, …]}      ShareGPT
    {"prompt": "…", "chosen": "…", "rejected": "…"}              preferences, as strings
    {"prompt": […], "chosen": […], "rejected": […]}              … or lists of messages

A `.jsonl` file has one record a line, a `.json` file a list of them. What is wrong with
a record is told with its file and line, before anything is trained.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minllama.architecture.chat import checked

Messages = list[dict[str, str]]

ROLES = {  # other names for the roles of chat.py
    "human": "user",
    "gpt": "assistant",
    "tool": "ipython",
    "function": "ipython",
    "observation": "ipython",
}
SHAPES = "instruction and output; messages; or conversations"


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's, and where they were read."""

    messages: Messages
    where: str  # "talks.jsonl, line 7"


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse answer: all texts, or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    where: str


def is_records(path: str | Path) -> bool:
    """Whether the name says JSON; any other file is plain text."""
    return Path(path).suffix.lower() in (".json", ".jsonl")


def read_records(path: str | Path) -> list[tuple[str, dict]]:
    """(where, record) of each JSON object of a file. "Where" names file and line.

    Raises:
        ValueError: no such file, no UTF-8, broken JSON, no object, or no record.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a .json or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 (byte {error.start}).") from None
    listed = text.lstrip().startswith("[")
    found = list(_listed(path, text) if listed else _lines(path, text))
    if not found:
        raise ValueError(f"{path} holds no record; give at least one.")
    for where, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {_short(record)} is no JSON object {{…}}.")
    return found


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{where}: no JSON ({error}); give one object a line, or a list "
                    "[…] of them."
                ) from None


def _listed(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no JSON ({error}).") from None
    except RecursionError as error:
        raise ValueError(f"{path}: no JSON ({error}).") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a file, in any of the shapes above.

    Raises:
        ValueError: as `read_records`; or a record without the fields it needs, with an
            unknown role, an empty answer, or no answer at all.
    """
    return [
        Conversation(_conversation(record, where), where)
        for where, record in read_records(path)
    ]


def _conversation(record: dict, where: str) -> Messages:
    if "messages" in record or "conversations" in record:
        key = "messages" if "messages" in record else "conversations"
        messages = _messages(record[key], f"{where}, {key}")
        if isinstance(record.get("system"), str) and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": record["system"]}, *messages]
    elif "instruction" in record and "output" in record:
        question = _text(record, "instruction", where)
        if record.get("input"):
            question += "\n" + _text(record, "input", where)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _text(record, "output", where)},
        ]
    else:
        raise ValueError(
            f"{where}: the fields {sorted(record)} are none of the known shapes "
            f"({SHAPES})."
        )
    return _answered(messages, where)


def _answered(messages: Messages, where: str) -> Messages:
    """`messages`, if there is a question and every answer says something."""
    turns = [m for m in messages if m["role"] != "system"]
    if not turns or turns[0]["role"] == "assistant":
        raise ValueError(
            f"{where}: begins with the assistant's message; begin with the user's."
        )
    answers = [m["content"] for m in turns if m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{where}: has no answer of the assistant, nothing to learn.")
    if not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: has an empty answer; fill it or leave it out.")
    return messages


def _messages(value: object, where: str) -> Messages:
    """A list of {"role", "content"} or {"from", "value"}, in our roles."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {_short(value)} is no list of messages.")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}, message {number}: {_short(message)} is none.")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = ROLES.get(role, role) if isinstance(role, str) else role
        try:
            messages.append(dict(checked({"role": role, "content": content})))  # type: ignore[dict-item]
        except ValueError as error:
            raise ValueError(f"{where}, message {number}: {error}") from None
    return messages


def _text(record: dict, key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key}={_short(value)} must be a string.")
    return value


def read_preferences(path: str | Path) -> list[Preference]:
    """Pairs of answers, the better one named. Without a prompt, messages share theirs.

    Raises:
        ValueError: as `read_records`; or a record without the fields, with strings and
            messages mixed, an empty answer, or two equal ones.
    """
    return [_preference(record, where) for where, record in read_records(path)]


def _preference(record: dict, where: str) -> Preference:
    missing = [key for key in ("chosen", "rejected") if key not in record]
    if missing:
        raise ValueError(
            f"{where}: has no {missing[0]!r} among {sorted(record)}; a preference has "
            "prompt, chosen and rejected."
        )
    if isinstance(record["chosen"], str):
        if "prompt" not in record:
            raise ValueError(f"{where}: texts need their prompt; add the field.")
        better, worse = (_text(record, key, where) for key in ("chosen", "rejected"))
        if not better.strip() or not worse.strip():
            raise ValueError(f"{where}: has an empty answer; fill it or leave it out.")
        if better == worse:
            raise ValueError(f"{where}: chosen and rejected are equal.")
        return Preference(_text(record, "prompt", where), better, worse, where)
    chosen = _messages(record["chosen"], f"{where}, chosen")
    rejected = _messages(record["rejected"], f"{where}, rejected")
    if "prompt" in record:
        prompt = _messages(record["prompt"], f"{where}, prompt")
    else:
        pairs = zip(chosen, rejected)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(chosen))
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are equal.")
    for answer in (chosen, rejected):
        if not answer or answer[-1]["role"] != "assistant":
            raise ValueError(f"{where}: an answer must end with the assistant's words.")
        _answered([*prompt, *answer], where)
    return Preference(prompt, chosen, rejected, where)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
