# SPDX-License-Identifier: Apache-2.0
"""Completion over HTTP: thin adapters from wire fields to `CompletionParams` and back."""
