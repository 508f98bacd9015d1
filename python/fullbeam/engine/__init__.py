# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests in, tokens and text out, one step at a time."""
