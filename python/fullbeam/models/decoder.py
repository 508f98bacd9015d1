# SPDX-License-Identifier: Apache-2.0
"""The decoder-only transformer, written once on `fullbeam.ops` and shaped by a DecoderConfig."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fullbeam import _core, ops
from fullbeam.engine.batch import Batch, FloatArray

_MAX_PROGRAMS = 64  # recorded steps to keep; one takes some kilobytes


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer."""

    inv_freq: FloatArray  # [rotated dimensions / 2], scaling already applied
    interleaved: bool = False  # pairs (2 i, 2 i + 1) instead of halves
    scale: float = 1.0  # factor of cosine and sine


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one family's forward pass from another's."""

    vocab_size: int
    context_len: int  # positions that the model was made for
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    ropes: tuple[Rope, ...]  # per layer
    windows: tuple[int, ...]  # per layer: keys that a query sees; 0 = all before it
    attention_scale: float
    norm_eps: float
    norm_offset: float = 0.0  # 1 where norm weights are stored as a difference from 1
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer; what a family lacks is None."""

    attention_norm: FloatArray  # [hidden_size]
    qkv: ops.PackedWeight  # [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    attention_out: ops.PackedWeight  # [hidden_size, num_q_heads * head_dim]
    ffn_norm: FloatArray  # [hidden_size]
    gate_up: ops.PackedWeight  # [2 * ffn_size, hidden_size]
    down: ops.PackedWeight  # [hidden_size, ffn_size]
    qkv_bias: FloatArray | None = None
    q_norm: FloatArray | None = None  # [head_dim]
    k_norm: FloatArray | None = None
    post_attention_norm: FloatArray | None = None  # [hidden_size], before the residual is added
    post_ffn_norm: FloatArray | None = None


@dataclass(frozen=True)
class Weights:
    """Weights of the whole model; `head` is `embedding` where the two are tied."""

    embedding: ops.PackedWeight  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    output_norm: FloatArray  # [hidden_size]
    head: ops.PackedWeight  # [vocab_size, hidden_size]


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


class _Buffers:
    """Fixed memory of a step: recorded programs point into it."""

    def __init__(self, config: DecoderConfig, tokens: int, seqs: int, max_pages: int) -> None:
        q_size = config.num_q_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.tokens, self.seqs, self.max_pages = tokens, seqs, max_pages
        self.token_ids = np.zeros(tokens, np.int32)
        self.positions = np.zeros(tokens, np.int32)
        self.slots = np.zeros(tokens, np.int64)
        self.query_starts = np.zeros(seqs + 1, np.int32)
        self.seq_lens = np.zeros(seqs, np.int32)
        self.page_table = np.zeros((seqs, max_pages), np.int32)
        self.hidden = np.zeros((tokens, config.hidden_size), np.float32)
        self.normed = np.zeros((tokens, config.hidden_size), np.float32)
        self.qkv = np.zeros((tokens, q_size + 2 * kv_size), np.float32)
        self.attended = np.zeros((tokens, q_size), np.float32)
        self.gate_up = np.zeros((tokens, 2 * config.ffn_size), np.float32)
        self.activated = np.zeros((tokens, config.ffn_size), np.float32)

    def holds(self, tokens: int, seqs: int, max_pages: int) -> bool:
        return tokens <= self.tokens and seqs <= self.seqs and max_pages == self.max_pages


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
        self._programs: OrderedDict[tuple[int, ...], _core.Program] = OrderedDict()
        self._buffers: _Buffers | None = None
        self._kv: KvCache | None = None
        self._head_in = np.zeros((0, config.hidden_size), np.float32)
        self._logits = np.zeros((0, config.vocab_size), np.float32)

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""
        config = self.config
        return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim

    def allocate_kv(self, num_pages: int, page_size: int) -> KvCache:
        """Make room for ``num_pages`` pages of ``page_size`` tokens."""
        return KvCache(self.config, num_pages, page_size)

    def forward(self, batch: Batch, kv: KvCache) -> FloatArray:
        """Return logits, float32 [num_logit_rows, vocab_size], valid until the next call."""
        _core.set_num_threads(self.threads)
        num_tokens, num_seqs = len(batch.token_ids), len(batch.seq_lens)
        b = self._fit_buffers(num_tokens, num_seqs, batch.page_table.shape[1], kv)
        b.token_ids[:num_tokens] = batch.token_ids
        b.positions[:num_tokens] = batch.positions
        b.slots[:num_tokens] = batch.slots
        b.seq_lens[:num_seqs] = batch.seq_lens
        b.page_table[:num_seqs] = batch.page_table
        num_decode = batch.num_decode
        b.query_starts[: num_seqs - num_decode + 1] = batch.query_starts[num_decode:] - num_decode
        self._run(
            (0, num_tokens, num_seqs, num_decode),
            lambda: self._layers(b, kv, num_tokens, num_seqs, num_decode),
        )
        num_rows = len(batch.logit_rows)
        self._fit_head(num_rows)
        np.take(b.hidden, batch.logit_rows, axis=0, out=self._head_in[:num_rows])
        if num_rows:
            self._run((1, num_rows), lambda: self._head(num_rows))
        return self._logits[:num_rows]

    def _run(self, shape: tuple[int, ...], record: Callable[[], None]) -> None:
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
        program.run()

    def _layers(
        self, b: _Buffers, kv: KvCache, num_tokens: int, num_seqs: int, num_decode: int
    ) -> None:
        """The forward pass up to the last layer's output."""
        config, n = self.config, num_tokens
        num_q, num_kv, dim = config.num_q_heads, config.num_kv_heads, config.head_dim
        eps, offset = config.norm_eps, config.norm_offset
        hidden, normed, positions = b.hidden[:n], b.normed[:n], b.positions[:n]
        heads = b.qkv[:n].reshape(n, num_q + 2 * num_kv, dim)
        query, key, value = np.split(heads, [num_q, num_q + num_kv], axis=1)
        attended = b.attended[:n].reshape(n, num_q, dim)
        ops.embedding(
            b.token_ids[:n], self.weights.embedding, scale=config.embedding_scale, out=hidden
        )
        for idx, layer in enumerate(self.weights.layers):
            rope = config.ropes[idx]
            keys, values = kv.keys[idx], kv.values[idx]
            ops.rms_norm(hidden, layer.attention_norm, eps=eps, weight_offset=offset, out=normed)
            ops.linear(normed, layer.qkv, bias=layer.qkv_bias, out=b.qkv[:n])
            if layer.q_norm is not None:
                ops.rms_norm(query, layer.q_norm, eps=eps, weight_offset=offset, out=query)
            if layer.k_norm is not None:
                ops.rms_norm(key, layer.k_norm, eps=eps, weight_offset=offset, out=key)
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
                    query[:num_decode],
                    keys,
                    values,
                    b.page_table[:num_decode],
                    b.seq_lens[:num_decode],
                    out=attended[:num_decode],
                    scale=config.attention_scale,
                    window=config.windows[idx],
                    softcap=config.attention_softcap,
                )
            if num_seqs > num_decode:
                ops.attention_prefill(
                    query[num_decode:],
                    keys,
                    values,
                    b.page_table[num_decode:num_seqs],
                    b.seq_lens[num_decode:num_seqs],
                    b.query_starts[: num_seqs - num_decode + 1],
                    out=attended[num_decode:],
                    scale=config.attention_scale,
                    window=config.windows[idx],
                    softcap=config.attention_softcap,
                )
            self._add(
                b.attended[:n], layer.attention_out, layer.post_attention_norm, hidden, normed
            )
            ops.rms_norm(hidden, layer.ffn_norm, eps=eps, weight_offset=offset, out=normed)
            ops.linear(normed, layer.gate_up, out=b.gate_up[:n])
            ops.gated_activation(b.gate_up[:n], activation=config.activation, out=b.activated[:n])
            self._add(b.activated[:n], layer.down, layer.post_ffn_norm, hidden, normed)

    def _add(
        self,
        x: FloatArray,
        weight: ops.PackedWeight,
        post_norm: FloatArray | None,
        hidden: FloatArray,
        spare: FloatArray,
    ) -> None:
        """hidden += weight x, normed before it is added where the family does so."""
        if post_norm is None:
            ops.linear(x, weight, residual=hidden, out=hidden)
            return
        ops.linear(x, weight, out=spare)
        ops.rms_norm(
            spare,
            post_norm,
            eps=self.config.norm_eps,
            weight_offset=self.config.norm_offset,
            residual=hidden,
            out=hidden,
        )

    def _head(self, num_rows: int) -> None:
        x = self._head_in[:num_rows]
        config = self.config
        ops.rms_norm(
            x,
            self.weights.output_norm,
            eps=config.norm_eps,
            weight_offset=config.norm_offset,
            out=x,
        )
        ops.linear(x, self.weights.head, out=self._logits[:num_rows])

    def _fit_buffers(self, tokens: int, seqs: int, max_pages: int, kv: KvCache) -> _Buffers:
        b = self._buffers
        if b is None or self._kv is not kv or not b.holds(tokens, seqs, max_pages):
            if b is not None:
                tokens, seqs = max(tokens, b.tokens), max(seqs, b.seqs)
            b = _Buffers(self.config, tokens, seqs, max_pages)
            self._buffers, self._kv = b, kv
            self._programs.clear()
        return b

    def _fit_head(self, num_rows: int) -> None:
        if num_rows > len(self._logits):
            self._head_in = np.zeros((num_rows, self.config.hidden_size), np.float32)
            self._logits = np.zeros((num_rows, self.config.vocab_size), np.float32)
            self._programs.clear()
