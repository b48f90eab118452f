"""Chat formats: how a list of messages becomes one row of tokens.

    llama3   <|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎⏎Hello!<|eot_id|>
             <|start_header_id|>assistant<|end_header_id|>⏎⏎
    chatml   <|im_start|>user⏎Hello!<|im_end|>⏎<|im_start|>assistant⏎
    llama2   <s>[INST] <<SYS>>⏎Be brief.⏎<</SYS>>⏎⏎Hello! [/INST] Hi! </s><s>[INST] ...

A model knows no turns. It was trained on conversations written in one format, and it
understands no other. Where special tokens mark the borders (Llama 3, ChatML), a user
cannot forge one, because what people wrote is encoded as plain text. Llama 2 marks them
with plain text, so content that holds such a mark is refused, as in Meta's own code.

"llama3" is the plain format of Llama 3 Instruct. From 3.1 on, Meta's template puts a
system message with two dates in front, and Qwen 2's one of its own; where you want such
a message, give it.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest

ROLES = ("system", "user", "assistant", "ipython")  # the last: output of a tool
LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

Messages = list[Mapping[str, str]]


class Special(str):
    """The name of a special token. A plain str is text, even if it spells the same."""


def chat_parts(
    messages: Iterable[Mapping[str, str]], prompt: bool, format: str | None
) -> Iterator[str]:
    """The conversation as text and `Special` names in turn.

    Where `prompt` holds, it ends where the assistant's answer begins.
    """
    if format not in FORMATS:
        raise ValueError(
            f"format={format!r} is no chat format, or none is known for these special "
            f"tokens; name one of {list(FORMATS)}."
        )
    messages = [checked(message) for message in messages]
    if not messages:
        raise ValueError("messages=[] is no conversation; begin with a user's message.")
    return FORMATS[format](messages, prompt)


def format_of(special_tokens: Iterable[str]) -> str | None:
    """The format that these special tokens are made for; None if they are for none."""
    return next((MARKS[name] for name in MARKS if name in special_tokens), None)


def checked(message: Mapping[str, str]) -> Mapping[str, str]:
    """`message`, if it has a known role and a text."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"role={role!r} is unknown; use one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(
            f"content={content!r} of the {role}'s message must be a string."
        )
    return message


def llama3(messages: Messages, prompt: bool) -> Iterator[str]:
    """Each message behind a header with its role."""
    yield Special("<|begin_of_text|>")
    for message in messages:
        yield from llama3_header(message["role"])
        yield "\n\n" + message["content"].strip()
        yield Special("<|eot_id|>")
    if prompt:
        yield from llama3_header("assistant")
        yield "\n\n"


def llama3_header(role: str) -> Iterator[str]:
    """The role between its two special tokens."""
    yield Special("<|start_header_id|>")
    yield role
    yield Special("<|end_header_id|>")


def chatml(messages: Messages, prompt: bool) -> Iterator[str]:
    """Each message with its role on the first line."""
    for message in messages:
        yield Special("<|im_start|>")
        yield f"{message['role']}\n{message['content']}"
        yield Special("<|im_end|>")
        yield "\n"
    if prompt:
        yield Special("<|im_start|>")
        yield "assistant\n"


def llama2(messages: Messages, prompt: bool) -> Iterator[str]:
    """Each question with its answer a text of its own; the last may wait for one."""
    system = ""
    if messages[0]["role"] == "system":
        system = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
        messages = messages[1:]
    for question, answer in zip_longest(messages[::2], messages[1::2]):
        text = f"[INST] {(system + question['content']).strip()} [/INST]"
        yield Special("<s>")
        yield f"{text} {answer['content'].strip()} " if answer else text
        if answer:
            yield Special("</s>")
        system = ""


def checked_llama2(messages: Messages, prompt: bool) -> Iterator[str]:
    """`llama2`, unless the format cannot express that, or mistakes it for its marks."""
    turns = messages[messages[0]["role"] == "system" :]
    for i, message in enumerate(turns or messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(
                f"role={message['role']!r} of turn {i + 1}: in llama2 chats user and "
                "assistant take turns, after at most one system message."
            )
    for message in messages:
        for mark in LLAMA2_MARKS:
            if mark in message["content"]:
                raise ValueError(
                    f"content with {mark!r} would change the conversation, whose turns "
                    "llama2 marks with plain text; take it out."
                )
    return llama2(messages, prompt)


FORMATS = {"llama3": llama3, "chatml": chatml, "llama2": checked_llama2}
MARKS = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml", "</s>": "llama2"}
TEMPLATES = {  # the same in Jinja, as transformers wants it beside a tokenizer
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set system = '' %}{% if messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{% set text = (system if loop.first else '') + message.content %}"
        "<s>[INST] {{ text | trim }} [/INST]"
        "{% else %} {{ message.content | trim }} </s>{% endif %}{% endfor %}"
    ),
}
