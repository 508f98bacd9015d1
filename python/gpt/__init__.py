# SPDX-License-Identifier: Apache-2.0
"""A client of `/v1/completions` and `/v1/models`, for programs written for the `gpt` SDK 4.0."""

from __future__ import annotations

from gpt.sdk import SERVERS, Gpt, SDKConfiguration

__all__ = ["SERVERS", "Gpt", "SDKConfiguration"]
