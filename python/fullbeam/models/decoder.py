# SPDX-License-Identifier: Apache-2.0
"""The decoder-only transformer, written once on `fullbeam.ops` and shaped by a DecoderConfig."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fullbeam import _core, ops
from fullbeam.engine.batch import Batch, FloatArray
from fullbeam.engine.runner import Interrupted
from fullbeam.models.config import DecoderConfig, LayerWeights, Linear, Norm, Weights

_MAX_PROGRAMS = 64  # recorded steps to keep; one takes some kilobytes

# What a row adds to a step of few, over a step of one: the dearer of Gemma 3 270M and Qwen2.5-Coder
# 0.5B, Q4_K_M, 2 threads of Zen 4, 1 to 16 rows of one sequence with their logits.
_ROW_COST = {"portable": 0.75, "avx2": 0.24, "avx512": 0.15}


class KvCache:
    """Keys and values of all layers, float16, in pages. The system gives memory as pages fill."""

    def __init__(self, config: DecoderConfig, num_pages: int, page_size: int) -> None:
        # A page's keys and values of all layers lie together: memory fills up page by page.
        page = (2, config.num_layers, config.num_kv_heads, page_size, config.head_dim)
        self._pages = np.zeros((num_pages, *page), np.float16)
        self.keys = [self._pages[:, 0, layer] for layer in range(config.num_layers)]
        self.values = [self._pages[:, 1, layer] for layer in range(config.num_layers)]

    def copy_page(self, src: int, dst: int) -> None:
        """Copy one page to another, in all layers."""
        self._pages[dst] = self._pages[src]


@dataclass(frozen=True)
class _Sizes:
    """Of a step, or of the buffers that hold it."""

    tokens: int
    seqs: int
    max_pages: int
    num_words: int

    def joined(self, other: _Sizes) -> _Sizes:
        """Room for both; widths grow in powers of 2, since every growth costs a recording."""
        return _Sizes(
            tokens=max(self.tokens, other.tokens),
            seqs=max(self.seqs, other.seqs),
            max_pages=_grown(self.max_pages, other.max_pages),
            num_words=_grown(self.num_words, other.num_words),
        )


def _grown(held: int, needed: int) -> int:
    return held if needed <= held else 1 << (needed - 1).bit_length()


class _Buffers:
    """Fixed memory of a step: recorded programs point into it."""

    def __init__(self, config: DecoderConfig, sizes: _Sizes) -> None:
        tokens, seqs, num_words = sizes.tokens, sizes.seqs, sizes.num_words
        q_size = config.num_q_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.sizes = sizes
        self.token_ids = np.zeros(tokens, np.int32)
        self.positions = np.zeros(tokens, np.int32)
        self.slots = np.zeros(tokens, np.int64)
        self.decode_starts = np.zeros(seqs + 1, np.int32)
        self.prefill_starts = np.zeros(seqs + 1, np.int32)
        self.seq_lens = np.zeros(seqs, np.int32)
        self.page_table = np.zeros((seqs, sizes.max_pages), np.int32)
        self.slot_starts = np.zeros(seqs, np.int32)
        self.num_slots = np.zeros(seqs, np.int32)
        self.visible = np.zeros((tokens, num_words), np.uint32)
        self.slot_positions = np.zeros((seqs, 32 * num_words), np.int32)
        self.hidden = np.zeros((tokens, config.hidden_size), np.float32)
        self.normed = np.zeros((tokens, config.hidden_size), np.float32)
        self.qkv = np.zeros((tokens, q_size + 2 * kv_size), np.float32)
        self.attended = np.zeros((tokens, q_size), np.float32)
        self.up = np.zeros((tokens, (1 + config.is_gated) * config.ffn_size), np.float32)
        self.activated = np.zeros((tokens, config.ffn_size), np.float32)

    def fill(self, batch: Batch) -> None:
        """Take the batch's arrays over; what lies beyond them is not read."""
        num_tokens, num_seqs = len(batch.token_ids), len(batch.seq_lens)
        num_decode, num_rows = batch.num_decode, batch.num_decode_rows
        self.token_ids[:num_tokens] = batch.token_ids
        self.positions[:num_tokens] = batch.positions
        self.slots[:num_tokens] = batch.slots
        self.seq_lens[:num_seqs] = batch.seq_lens
        self.page_table[:num_seqs, : batch.page_table.shape[1]] = batch.page_table
        self.prefill_starts[: num_seqs - num_decode + 1] = (
            batch.query_starts[num_decode:] - num_rows
        )
        if batch.num_words:
            self.decode_starts[: num_decode + 1] = batch.query_starts[: num_decode + 1]
            self.slot_starts[:num_decode] = batch.slot_starts
            self.num_slots[:num_decode] = batch.num_slots
            self.visible[:num_rows, : batch.num_words] = batch.visible
            self.slot_positions[:num_decode, : 32 * batch.num_words] = batch.slot_positions


class _Rows:
    """Fixed memory of the rows whose logits are wanted."""

    def __init__(self, config: DecoderConfig, num_rows: int) -> None:
        self.hidden = np.zeros((num_rows, config.hidden_size), np.float32)
        self.attended = np.zeros((num_rows, config.num_q_heads * config.head_dim), np.float32)
        self.logits = np.zeros((num_rows, config.vocab_size), np.float32)


@dataclass(frozen=True)
class _Shape:
    """What a recorded step depends on."""

    num_tokens: int
    num_seqs: int
    num_decode: int
    num_decode_rows: int
    has_slots: bool


class Decoder:
    """A model ready to run: tokens and their places in, logits out.

    A step of a given shape is recorded the first time and replayed natively from then on, like a
    captured graph: what changes between steps (ids, positions, pages, lengths) is read from fixed
    buffers. Use from one thread.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, *, threads: int) -> None:
        self.config = config
        self.weights = weights
        self.threads = threads
        self._programs: OrderedDict[_Shape | int, _core.Program] = OrderedDict()
        self._buffers: _Buffers | None = None
        self._kv: KvCache | None = None
        self._rows = _Rows(config, 0)

    @property
    def row_cost(self) -> float:
        """What one more token adds to a step of few, as a share of a step of one."""
        return _ROW_COST[_core.cpu_isa()]

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        config = self.config
        return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim

    def allocate_kv(self, num_pages: int, page_size: int) -> KvCache:
        """Make room for ``num_pages`` pages of ``page_size`` tokens."""
        return KvCache(self.config, num_pages, page_size)

    def forward(self, batch: Batch, kv: KvCache, stop: _core.Stop | None = None) -> FloatArray:
        """Return logits, float32 [num_logit_rows, vocab_size], valid until the next call.

        Raises `Interrupted` after the op in which `stop` is set.
        """
        _core.set_num_threads(self.threads)
        shape = _Shape(
            num_tokens=len(batch.token_ids),
            num_seqs=len(batch.seq_lens),
            num_decode=batch.num_decode,
            num_decode_rows=batch.num_decode_rows,
            has_slots=batch.num_words > 0,
        )
        b = self._fit_buffers(batch, kv)
        b.fill(batch)
        self._run(shape, lambda: self._layers(b, kv, shape), stop)
        num_rows = len(batch.logit_rows)
        rows = self._fit_rows(num_rows)
        if num_rows:
            np.take(b.hidden, batch.logit_rows, axis=0, out=rows.hidden[:num_rows])
            np.take(b.attended, batch.logit_rows, axis=0, out=rows.attended[:num_rows])
            self._run(num_rows, lambda: self._head(b, rows, num_rows), stop)
        return rows.logits[:num_rows]

    def _run(
        self, shape: _Shape | int, record: Callable[[], None], stop: _core.Stop | None
    ) -> None:
        program = self._programs.get(shape)
        if program is None:
            _core.start_recording()
            try:
                record()
            finally:
                program = _core.stop_recording()
            self._programs[shape] = program
            if len(self._programs) > _MAX_PROGRAMS:
                self._programs.popitem(last=False)
        else:
            self._programs.move_to_end(shape)
        if not program.run(stop):
            raise Interrupted

    def _layers(self, b: _Buffers, kv: KvCache, shape: _Shape) -> None:
        """The forward pass up to the last layer's attention: what its keys and values serve."""
        config, n = self.config, shape.num_tokens
        num_seqs, num_decode, num_rows = shape.num_seqs, shape.num_decode, shape.num_decode_rows
        num_q, num_kv, dim = config.num_q_heads, config.num_kv_heads, config.head_dim
        eps, offset = config.norm_eps, config.norm_offset
        hidden, normed, positions = b.hidden[:n], b.normed[:n], b.positions[:n]
        heads = b.qkv[:n].reshape(n, num_q + 2 * num_kv, dim)
        query, key, value = np.split(heads, [num_q, num_q + num_kv], axis=1)
        attended = b.attended[:n].reshape(n, num_q, dim)
        searches = {}
        if shape.has_slots:
            searches = {
                "query_starts": b.decode_starts[: num_decode + 1],
                "slot_starts": b.slot_starts[:num_decode],
                "num_slots": b.num_slots[:num_decode],
                "visible": b.visible[:num_rows],
                "slot_positions": b.slot_positions[:num_decode],
                "positions": positions[:num_rows],
            }
        ops.embedding(
            b.token_ids[:n], self.weights.embedding, scale=config.embedding_scale, out=hidden
        )
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
                    rope.inv_freq,
                    interleaved=rope.interleaved,
                    scale=rope.scale,
                )
            ops.kv_write(key, value, keys, values, b.slots[:n])
            if num_decode:
                ops.attention_decode(
                    query[:num_rows],
                    keys,
                    values,
                    b.page_table[:num_decode],
                    b.seq_lens[:num_decode],
                    **searches,
                    out=attended[:num_rows],
                    scale=config.attention_scale,
                    window=config.windows[idx],
                    softcap=config.attention_softcap,
                )
            if num_seqs > num_decode:
                ops.attention_prefill(
                    query[num_rows:],
                    keys,
                    values,
                    b.page_table[num_decode:num_seqs],
                    b.seq_lens[num_decode:num_seqs],
                    b.prefill_starts[: num_seqs - num_decode + 1],
                    out=attended[num_rows:],
                    scale=config.attention_scale,
                    window=config.windows[idx],
                    softcap=config.attention_softcap,
                )
            if idx + 1 < config.num_layers:
                self._feed_forward(layer, b.attended[:n], hidden, b)

    def _feed_forward(
        self, layer: LayerWeights, attended: FloatArray, hidden: FloatArray, b: _Buffers
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

    def _norm(self, x: FloatArray, norm: Norm, out: FloatArray) -> None:
        eps, offset = self.config.norm_eps, self.config.norm_offset
        if norm.bias is None:
            ops.rms_norm(x, norm.weight, eps=eps, weight_offset=offset, out=out)
        else:
            ops.layer_norm(x, norm.weight, norm.bias, eps=eps, out=out)

    def _add(
        self,
        x: FloatArray,
        linear: Linear,
        post_norm: FloatArray | None,
        hidden: FloatArray,
        spare: FloatArray,
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

    def _head(self, b: _Buffers, rows: _Rows, num_rows: int) -> None:
        """The rest of the last layer and the logits, of the rows that want them."""
        config, x, logits = self.config, rows.hidden[:num_rows], rows.logits[:num_rows]
        self._feed_forward(self.weights.layers[-1], rows.attended[:num_rows], x, b)
        self._norm(x, self.weights.output_norm, x)
        ops.linear(x, self.weights.head, out=logits)
        if config.logit_softcap:
            ops.softcap(logits, config.logit_softcap, out=logits)

    def _fit_buffers(self, batch: Batch, kv: KvCache) -> _Buffers:
        b = self._buffers
        needed = _Sizes(
            tokens=len(batch.token_ids),
            seqs=len(batch.seq_lens),
            max_pages=batch.page_table.shape[1],
            num_words=batch.num_words,
        )
        sizes = needed if b is None else b.sizes.joined(needed)
        if b is None or self._kv is not kv or sizes != b.sizes:
            b = _Buffers(self.config, sizes)
            self._buffers, self._kv = b, kv
            self._programs.clear()
        return b

    def _fit_rows(self, num_rows: int) -> _Rows:
        if num_rows > len(self._rows.logits):
            self._rows = _Rows(self.config, num_rows)
            self._programs.clear()
        return self._rows
