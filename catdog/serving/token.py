"""The token that requests for labels must bring."""

import os
from typing import Final

from catdog import storage
from catdog.config import ServeConfig
from catdog.errors import UsageError

VARIABLE: Final = "CATDOG_TOKEN"
"""Environment variable that holds the token where `--token-file` is not given."""


def read_token(config: ServeConfig) -> str | None:
    """The token that requests must bring; None if there is none.

    Raises:
        UsageError: it is empty, or has characters that a header may not have.
    """
    if config.token_file is None:
        token, where = os.environ.get(VARIABLE), VARIABLE
    else:
        token, where = storage.read_text(config.token_file).strip(), "--token-file"
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{where} must hold a token of printable ASCII characters. Received: {len(token)} characters")
    return token
