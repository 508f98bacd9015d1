# SPDX-License-Identifier: Apache-2.0
"""The decoder-only transformer, written once on `fullbeam.ops` and shaped by a DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fullbeam import _core, ops
from fullbeam.engine.batch import Batch
from fullbeam.engine.device import Device, HostArray, Programs
from fullbeam.engine.runner import Interrupted
from fullbeam.models.config import DecoderConfig, LayerWeights, Linear, Norm, Weights
from fullbeam.ops import Array


class KvCache:
    """Keys and values of all layers in pages. On the CPU the system gives memory as they fill."""

    def __init__(
        self, config: DecoderConfig, num_pages: int, page_size: int, device: Device
    ) -> None:
        # A page's keys and values of all layers lie together: memory fills up page by page.
        page = (2, config.num_layers, config.num_kv_heads, page_size, config.head_dim)
        self._pages = device.zeros((num_pages, *page), device.kv_dtype)
        self.keys = [self._pages[:, 0, layer] for layer in range(config.num_layers)]
        self.values = [self._pages[:, 1, layer] for layer in range(config.num_layers)]

    def copy_page(self, src: int, dst: int) -> None:
        """Copy one page to another, in all layers."""
        self._pages[dst] = self._pages[src]


@dataclass(frozen=True)
class _Shape:
    """Sizes of a step: all that a recorded one depends on."""

    num_rows: int  # tokens of the sequences that decode
    num_decode: int
    num_chunk_tokens: int  # of the others
    num_chunks: int
    num_logit_rows: int
    largest_only: bool
    has_slots: bool

    @property
    def num_tokens(self) -> int:
        return self.num_rows + self.num_chunk_tokens


def _shape_of(batch: Batch, device: Device) -> _Shape:
    rounded = device.rounded
    has_slots = batch.num_words > 0
    num_rows = rounded(batch.num_decode_rows)
    return _Shape(
        num_rows=num_rows,
        num_decode=rounded(batch.num_decode) if has_slots else num_rows,
        num_chunk_tokens=rounded(len(batch.token_ids) - batch.num_decode_rows),
        num_chunks=rounded(len(batch.seq_lens) - batch.num_decode),
        num_logit_rows=rounded(len(batch.logit_rows)),
        largest_only=batch.largest_only and device.gains_largest_only,
        has_slots=has_slots,
    )


@dataclass(frozen=True)
class _Capacity:
    """Of the buffers that hold a step."""

    tokens: int
    seqs: int
    max_pages: int
    num_words: int

    def joined(self, other: _Capacity) -> _Capacity:
        """Room for both; widths grow in powers of 2, since every growth costs a recording."""
        return _Capacity(
            tokens=max(self.tokens, other.tokens),
            seqs=max(self.seqs, other.seqs),
            max_pages=_grown(self.max_pages, other.max_pages),
            num_words=_grown(self.num_words, other.num_words),
        )


def _grown(held: int, needed: int) -> int:
    return held if needed <= held else 1 << (needed - 1).bit_length()


class _Buffers:
    """Fixed memory of a step: recorded programs point into it."""

    def __init__(self, config: DecoderConfig, capacity: _Capacity, device: Device) -> None:
        tokens, seqs, num_words = capacity.tokens, capacity.seqs, capacity.num_words
        q_size = config.num_q_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.capacity = capacity
        self.inputs = device.inputs(
            {
                "token_ids": ((tokens,), "int32"),
                "positions": ((tokens,), "int32"),
                "slots": ((tokens,), "int64"),
                "sources": ((tokens,), "int32"),
                "decode_starts": ((seqs + 1,), "int32"),
                "chunk_starts": ((seqs + 1,), "int32"),
                "decode_lens": ((seqs,), "int32"),
                "chunk_lens": ((seqs,), "int32"),
                "decode_pages": ((seqs, capacity.max_pages), "int32"),
                "chunk_pages": ((seqs, capacity.max_pages), "int32"),
                "slot_starts": ((seqs,), "int32"),
                "num_slots": ((seqs,), "int32"),
                "visible": ((tokens, num_words), "uint32"),
                "slot_positions": ((seqs, 32 * num_words), "int32"),
                "logit_rows": ((tokens,), "int32"),
            }
        )

        def zeros(*shape: int) -> Array:
            return device.zeros(shape, device.dtype)

        # Tokens that the step before drew, where the host doesn't know them yet.
        self.drawn = device.zeros((tokens,), "int32") if device.runs_ahead else None
        self.hidden = zeros(tokens, config.hidden_size)
        self.normed = zeros(tokens, config.hidden_size)
        self.qkv = zeros(tokens, q_size + 2 * kv_size)
        self.attended = zeros(tokens, q_size)
        self.up = zeros(tokens, (1 + config.is_gated) * config.ffn_size)
        self.activated = zeros(tokens, config.ffn_size)

    def send(self, batch: Batch, shape: _Shape) -> None:
        """Take the batch's arrays over, for a step of at least its sizes.

        Rows, sequences and tokens beyond the batch's write no keys and values and see none.
        """
        host, num_rows, num_decode = self.inputs.host, batch.num_decode_rows, batch.num_decode
        num_chunk_tokens = len(batch.token_ids) - num_rows
        gap = shape.num_rows - num_rows  # between the rows that decode and the others
        for name, fill in (("token_ids", 0), ("positions", 0), ("slots", -1)):
            values, into = getattr(batch, name), host[name][: shape.num_tokens]
            if len(values) == len(into):
                into[:] = values
                continue
            into[:num_rows] = values[:num_rows]
            into[num_rows : shape.num_rows] = fill
            into[shape.num_rows :][:num_chunk_tokens] = values[num_rows:]
            into[shape.num_rows + num_chunk_tokens :] = fill
        lens, width = batch.seq_lens, batch.page_table.shape[1]
        if shape.num_decode:
            _fill(host["decode_lens"][: shape.num_decode], lens[:num_decode], 0)
            host["decode_pages"][:num_decode, :width] = batch.page_table[:num_decode]
        if shape.num_chunks:
            _fill(host["chunk_lens"][: shape.num_chunks], lens[num_decode:], 0)
            num_chunks = len(lens) - num_decode
            host["chunk_pages"][:num_chunks, :width] = batch.page_table[num_decode:]
            chunk_starts = host["chunk_starts"][: shape.num_chunks + 1]
            _fill(chunk_starts, batch.query_starts[num_decode:] - num_rows, num_chunk_tokens)
        rows = batch.logit_rows
        if gap:
            rows = np.where(rows < num_rows, rows, rows + gap)
        _fill(host["logit_rows"][: shape.num_logit_rows], rows, 0)
        if batch.num_words:
            decode_starts = host["decode_starts"][: shape.num_decode + 1]
            _fill(decode_starts, batch.query_starts[: num_decode + 1], num_rows)
            host["slot_starts"][:num_decode] = batch.slot_starts
            _fill(host["num_slots"][: shape.num_decode], batch.num_slots, 0)
            host["visible"][:num_rows, : batch.num_words] = batch.visible
            host["slot_positions"][:num_decode, : 32 * batch.num_words] = batch.slot_positions
        if self.drawn is not None:
            _fill(host["sources"][: shape.num_tokens], batch.sources, -1)
            if batch.drawn is not None:
                self.drawn[: len(batch.drawn)] = batch.drawn
        self.inputs.send()


def _fill(into: HostArray, values: HostArray, fill: int) -> None:
    into[: len(values)] = values
    into[len(values) :] = fill


class _Rows:
    """Fixed memory of the rows whose logits are wanted."""

    def __init__(self, config: DecoderConfig, num_rows: int, device: Device) -> None:
        q_size = config.num_q_heads * config.head_dim
        self.hidden = device.zeros((num_rows, config.hidden_size), device.dtype)
        self.attended = device.zeros((num_rows, q_size), device.dtype)
        self.logits = device.zeros((num_rows, config.vocab_size), "float32")


class Decoder:
    """A model ready to run: tokens and their places in, logits out.

    A step of given sizes is recorded and run again natively from then on, a captured graph on a
    GPU: what changes between steps (ids, positions, pages, lengths) is read from fixed buffers. Use
    from one thread.

    Parameters
    ----------
    config, weights
        The weights are on the device: PackedWeight on the CPU, tensors of its dtype on a GPU.
    device
        What computes.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, *, device: Device) -> None:
        self.config = config
        self.weights = weights
        self.device = device
        self._programs = Programs(device)
        self._buffers: _Buffers | None = None
        self._kv: KvCache | None = None
        self._rows = _Rows(config, 0, device)
        freqs = {id(r): device.upload(r.inv_freq) for r in config.ropes if r is not None}
        self._inv_freqs = [freqs.get(id(rope)) for rope in config.ropes]

    @property
    def row_cost(self) -> float:
        """What one more token adds to a step of few, as a share of a step of one."""
        return self.device.row_cost

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        config = self.config
        size = 4 if self.device.kv_dtype == "float32" else 2
        return 2 * size * config.num_layers * config.num_kv_heads * config.head_dim

    def allocate_kv(self, num_pages: int, page_size: int) -> KvCache:
        """Make room for ``num_pages`` pages of ``page_size`` tokens."""
        return KvCache(self.config, num_pages, page_size, self.device)

    def forward(self, batch: Batch, kv: KvCache, stop: _core.Stop | None = None) -> Array:
        """Return logits, float32 [num_logit_rows, vocab_size], valid until the next call.

        Where only the largest matter, others may be anything below it from their true value up.
        Raises `Interrupted` after the op in which `stop` is set.
        """
        with self.device.active():
            shape = _shape_of(batch, self.device)
            self._fit(batch, shape, kv)
            b, rows = self._buffers, self._rows
            assert b is not None
            b.send(batch, shape)
            if not self._run(shape, lambda: self._record(b, rows, kv, shape), stop):
                raise Interrupted
            return rows.logits[: len(batch.logit_rows)]

    def _record(self, b: _Buffers, rows: _Rows, kv: KvCache, shape: _Shape) -> None:
        self._layers(b, kv, shape)
        if shape.num_logit_rows:
            self._head(b, rows, shape)

    def _layers(self, b: _Buffers, kv: KvCache, shape: _Shape) -> None:
        """The forward pass up to the last layer's attention: what its keys and values serve."""
        config, n = self.config, shape.num_tokens
        num_rows, num_decode, num_chunks = shape.num_rows, shape.num_decode, shape.num_chunks
        num_q, num_kv, dim = config.num_q_heads, config.num_kv_heads, config.head_dim
        eps, offset = config.norm_eps, config.norm_offset
        given = b.inputs.device
        hidden, normed, positions = b.hidden[:n], b.normed[:n], given["positions"][:n]
        heads = b.qkv[:n].reshape(n, num_q + 2 * num_kv, dim)
        query, key = heads[:, :num_q], heads[:, num_q : num_q + num_kv]
        value = heads[:, num_q + num_kv :]
        attended = b.attended[:n].reshape(n, num_q, dim)
        searches = {}
        if shape.has_slots:
            searches = {
                "query_starts": given["decode_starts"][: num_decode + 1],
                "slot_starts": given["slot_starts"][:num_decode],
                "num_slots": given["num_slots"][:num_decode],
                "visible": given["visible"][:num_rows],
                "slot_positions": given["slot_positions"][:num_decode],
                "positions": positions[:num_rows],
            }
        token_ids, slots = given["token_ids"][:n], given["slots"][:n]
        if b.drawn is not None:
            token_ids = self.device.merged(token_ids, given["sources"][:n], b.drawn)
        ops.embedding(token_ids, self.weights.embedding, scale=config.embedding_scale, out=hidden)
        if self.weights.positions is not None:
            ops.embedding(positions, self.weights.positions, residual=hidden, out=hidden)
        for idx, layer in enumerate(self.weights.layers):
            rope = config.ropes[idx]
            keys, values = kv.keys[idx], kv.values[idx]
            self._norm(hidden, layer.attention_norm, normed)
            ops.linear(normed, layer.qkv.weight, bias=layer.qkv.bias, out=b.qkv[:n])
            if layer.q_norm is not None:
                ops.rms_norm(query, layer.q_norm, eps=eps, weight_offset=offset, out=query)
            if layer.k_norm is not None:
                ops.rms_norm(key, layer.k_norm, eps=eps, weight_offset=offset, out=key)
            if rope is not None:
                ops.rope(
                    heads[:, : num_q + num_kv],
                    positions,
                    self._inv_freqs[idx],
                    interleaved=rope.interleaved,
                    scale=rope.scale,
                )
            ops.kv_write(key, value, keys, values, slots)
            if num_decode:
                ops.attention_decode(
                    query[:num_rows],
                    keys,
                    values,
                    given["decode_pages"][:num_decode],
                    given["decode_lens"][:num_decode],
                    **searches,
                    out=attended[:num_rows],
                    scale=config.attention_scale,
                    window=config.windows[idx],
                    softcap=config.attention_softcap,
                )
            if num_chunks:
                ops.attention_prefill(
                    query[num_rows:],
                    keys,
                    values,
                    given["chunk_pages"][:num_chunks],
                    given["chunk_lens"][:num_chunks],
                    given["chunk_starts"][: num_chunks + 1],
                    out=attended[num_rows:],
                    scale=config.attention_scale,
                    window=config.windows[idx],
                    softcap=config.attention_softcap,
                )
            if idx + 1 < config.num_layers:
                self._feed_forward(layer, b.attended[:n], hidden, b)

    def _feed_forward(
        self, layer: LayerWeights, attended: Array, hidden: Array, b: _Buffers
    ) -> None:
        """What follows a layer's attention, row by row."""
        config, n = self.config, len(hidden)
        normed, up, activated = b.normed[:n], b.up[:n], b.activated[:n]
        if config.is_parallel:
            self._norm(hidden, layer.ffn_norm, normed)
        self._add(attended, layer.attention_out, layer.post_attention_norm, hidden, normed)
        if not config.is_parallel:
            self._norm(hidden, layer.ffn_norm, normed)
        ops.linear(normed, layer.up.weight, bias=layer.up.bias, out=up)
        activate = ops.gated_activation if config.is_gated else ops.activation
        activate(up, activation=config.activation, out=activated)
        self._add(activated, layer.down, layer.post_ffn_norm, hidden, normed)

    def _norm(self, x: Array, norm: Norm, out: Array) -> None:
        eps, offset = self.config.norm_eps, self.config.norm_offset
        if norm.bias is None:
            ops.rms_norm(x, norm.weight, eps=eps, weight_offset=offset, out=out)
        else:
            ops.layer_norm(x, norm.weight, norm.bias, eps=eps, out=out)

    def _add(
        self,
        x: Array,
        linear: Linear,
        post_norm: Array | None,
        hidden: Array,
        spare: Array,
    ) -> None:
        """hidden += linear(x), normed before it is added where the family does so."""
        if post_norm is None:
            ops.linear(x, linear.weight, bias=linear.bias, residual=hidden, out=hidden)
            return
        ops.linear(x, linear.weight, bias=linear.bias, out=spare)
        ops.rms_norm(
            spare,
            post_norm,
            eps=self.config.norm_eps,
            weight_offset=self.config.norm_offset,
            residual=hidden,
            out=hidden,
        )

    def _head(self, b: _Buffers, rows: _Rows, shape: _Shape) -> None:
        """The rest of the last layer and the logits, of the rows that want them."""
        config, n = self.config, shape.num_logit_rows
        wanted = b.inputs.device["logit_rows"][:n]
        x, attended, logits = rows.hidden[:n], rows.attended[:n], rows.logits[:n]
        ops.embedding(wanted, b.hidden[: shape.num_tokens], out=x)
        ops.embedding(wanted, b.attended[: shape.num_tokens], out=attended)
        self._feed_forward(self.weights.layers[-1], attended, x, b)
        self._norm(x, self.weights.output_norm, x)
        # Capping can make equals of different logits: then bounds must not stand for them.
        largest_only = shape.largest_only and not config.logit_softcap
        ops.linear(x, self.weights.head, out=logits, largest_only=largest_only)
        if config.logit_softcap:
            ops.softcap(logits, config.logit_softcap, out=logits)

    def _run(self, shape: _Shape, record: Callable[[], None], stop: _core.Stop | None) -> bool:
        return self._programs.run(shape, record, stop)

    def _fit(self, batch: Batch, shape: _Shape, kv: KvCache) -> None:
        b, rows = self._buffers, self._rows
        needed = _Capacity(
            tokens=max(shape.num_tokens, shape.num_logit_rows),
            seqs=max(shape.num_decode, shape.num_chunks),
            max_pages=batch.page_table.shape[1],
            num_words=batch.num_words,
        )
        capacity = needed if b is None else b.capacity.joined(needed)
        if b is None or self._kv is not kv or capacity != b.capacity:
            self._buffers, self._kv = _Buffers(self.config, capacity, self.device), kv
            self._programs.clear()
        if shape.num_logit_rows > len(rows.logits):
            self._rows = _Rows(self.config, shape.num_logit_rows, self.device)
            self._programs.clear()
