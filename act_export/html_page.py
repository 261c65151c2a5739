"""Parts of an HTML page that opens from disk and asks the network for nothing: its scripts, and the data they show."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any


def as_script(text: str) -> str:
    """Line ends as the HTML parser makes them, so that the hash is right, and nothing that would end the element."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return plain.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def as_json(document: Mapping[str, Any]) -> str:
    """JSON in which no text can be taken for HTML."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def script_hash(script: str) -> str:
    """What a Content-Security-Policy names a script by that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"
