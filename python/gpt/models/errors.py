# SPDX-License-Identifier: Apache-2.0
"""What the operations raise."""

from __future__ import annotations

import requests


class SDKError(Exception):
    """An answer that is an error, or that is not of the documented form."""

    def __init__(
        self, message: str, status_code: int, body: str, raw_response: requests.Response
    ) -> None:
        super().__init__(message, status_code, body, raw_response)
        self.message = message
        self.status_code = status_code
        self.body = body
        self.raw_response = raw_response

    def __str__(self) -> str:
        """Return message and status, then the body if there is one."""
        body = f"\n{self.body}" if self.body else ""
        return f"{self.message}: Status {self.status_code}{body}"
