"""A user's own prompts: a JSON Lines file, as it is or gzip-compressed."""

import gzip
import json
import zlib
from pathlib import Path

from prefixtree.demo.problems import Prompt


class PromptsFileError(ValueError):
    """The file cannot be read as prompts; the message names the file, the line and the reason."""


def load_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file that has one JSON object a line, each with a string field `prompt`.

    A field `task_id` that is a string names the prompt, otherwise its line does. Blank lines are
    passed over. Raises PromptsFileError for a file that cannot be read or holds no prompt, and
    for the first line that is no prompt.
    """
    prompts = []
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if line.strip():
            try:
                prompts.append(_parse(line, number))
            except ValueError as error:
                raise PromptsFileError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise PromptsFileError(f"{path}: no prompts in this file")
    return prompts


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except OSError as error:
        raise PromptsFileError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise PromptsFileError(f"{path}: not a whole gzip file ({error})") from None


def _parse(line: bytes, number: int) -> Prompt:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("not a prompt: JSON nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, not {_KINDS[type(record)]}")
    if "prompt" not in record:
        raise ValueError("the object has no field 'prompt'")
    text, name = record["prompt"], record.get("task_id")
    if not isinstance(text, str):
        raise ValueError(f"field 'prompt' must be a string, not {_KINDS[type(text)]}")
    if not text:
        raise ValueError("field 'prompt' is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field 'prompt' has a lone surrogate, {text[error.start]!r}") from None
    return Prompt(name if isinstance(name, str) and name else f"line {number}", text)


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
