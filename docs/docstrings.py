"""Docstrings are plain text, not Markdown: shown as typed. An extension of griffe."""

import re

import griffe

SPECIAL = {mark: f"&#{ord(mark)};" for mark in "*_[]<>$\\"}
NAME = re.compile(r"(    [\w*][\w*, .]*: )?(.*)")  # an argument stays as it is
TEXT = re.compile(r"(`+[^`]+`+)")


class PlainText(griffe.Extension):
    """Each docstring as typed, and under it the way to its lines in the whole file."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
            if not obj.is_module:
                page = obj.relative_filepath.with_suffix(".html").as_posix()
                place = f"../../source/{page}#__codelineno-0-{obj.lineno}"
                link = f'<a class="to-source" href="{place}">source</a>'
                obj.docstring.value += f"\n\n{link}"


def markdown(text: str) -> str:
    """A docstring -> Markdown that looks like it; `Example:` becomes code."""
    lines, section, example = [], False, False
    for line in text.splitlines():
        if re.match(r"\w+:$", line):
            section, example = True, line == "Example:"
        elif line and not line.startswith(" "):
            section = example = False
        drawn = example or (line.startswith("    ") and not section)
        name, rest = NAME.fullmatch(line).groups() if section else ("", line)
        lines.append(line if drawn else (name or "") + escaped(rest))
    return re.sub(r"^Example:$", "Examples:", "\n".join(lines), flags=re.MULTILINE)


def escaped(line: str) -> str:
    """Marks that mean something in Markdown, as themselves; `code` stays code."""
    parts = TEXT.split(line)
    parts[::2] = [
        "".join(SPECIAL.get(mark, mark) for mark in part) for part in parts[::2]
    ]
    return "".join(parts)
