"""Reading a JSON object from a file, with errors a user can act on."""

import json
from pathlib import Path


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8, not JSON (with line and column), or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
