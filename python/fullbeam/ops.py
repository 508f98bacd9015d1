# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions on arrays.

Arrays are numpy arrays or anything with ``__dlpack__`` (torch, cupy, jax); nothing is copied.
Results are new arrays of the first argument's kind unless ``out`` is given; of jax's, which no op
may write to, they are numpy arrays. ``out`` shares no memory with what is read, but where an op
says so. Activations are contiguous in their last dimension, and float32; on CUDA all of a call's
may be float16 or bfloat16 instead. CUDA ops go to torch's current stream (the default stream for
other arrays) and nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fullbeam import _core
from fullbeam._core import PackedWeight

Array = Any

__all__ = [
    "BeamStep",
    "PackedWeight",
    "Sample",
    "activation",
    "attention_decode",
    "attention_prefill",
    "beam_step",
    "dequantise",
    "embedding",
    "gated_activation",
    "kv_write",
    "layer_norm",
    "linear",
    "logprobs",
    "pack_weight",
    "rms_norm",
    "rope",
    "sample",
    "softcap",
]


def _size(x: Array, axis: int) -> int:
    """0 for what has no such axis: the op refuses it then."""
    shape = getattr(x, "shape", ())
    return shape[axis] if axis < len(shape) else 0


def _largest(x: Array) -> int:
    """The largest integer in an array, at least 0."""
    values = x.reshape(-1).tolist() if hasattr(x, "reshape") else []
    return max([0, *(value for value in values if isinstance(value, int))])


def _new(like: Array, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """Of the kind of `like`, and on its device."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    if hasattr(like, "new_empty"):  # torch
        import torch

        return like.new_empty(shape, dtype=getattr(torch, dtype))
    if hasattr(like, "__cuda_array_interface__"):
        import cupy

        with like.device:
            return cupy.empty(shape, dtype)
    return np.empty(shape, dtype)


def _new_activation(like: Array, shape: tuple[int, ...]) -> Array:
    """Of the dtype of `like` too."""
    if hasattr(like, "new_empty"):  # torch
        return like.new_empty(shape)
    return _new(like, shape, str(getattr(like, "dtype", "float32")))


def _new_like(x: Array) -> Array:
    """Of the shape of `x` too."""
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype)
    if hasattr(x, "new_empty"):  # torch; faster than by the shape
        import torch

        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return _new_activation(x, tuple(getattr(x, "shape", ())))


def pack_weight(
    parts: Sequence[tuple[Array, str, tuple[int, int]]], *, largest_only: bool = False
) -> PackedWeight:
    """Lay a weight matrix out for `linear` and `embedding`.

    Parameters
    ----------
    parts : (data, type, (rows, cols)) each
        uint8 bytes of a GGUF tensor, row-major, and its type: F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0
        Q5_1 Q4_K Q5_K Q6_K. Parts are stacked by rows and keep their types: one product serves
        query, key and value, or gate and up.
    largest_only : bool
        The halves of Q8_0 values lie apart, so that `linear` can do without most of the lower ones
        where only each token's largest value matters. Products of many tokens are up to 7 % slower.

    Returns
    -------
    PackedWeight
        With ``shape``, ``types``, ``num_bytes`` and, of those, the ``low_bytes`` that
        ``largest_only`` mostly spares; independent of the arrays given.

    Raises
    ------
    ValueError
        Unknown type, columns that are no multiple of its block, or a number of bytes that
        doesn't fit the shape.
    """
    return _core.pack_weight(list(parts), largest_only)


def dequantise(
    data: Array,
    kind: str,
    shape: tuple[int, int],
    *,
    dtype: str = "float32",
    out: Array | None = None,
) -> Array:
    """A weight matrix from its bytes in a GGUF file.

    Parameters
    ----------
    data : uint8 [num_bytes]
        Row-major, exactly the matrix.
    kind : F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K
    shape : (rows, cols)
    dtype : "float32", "float16" or "bfloat16"
        Of the new array; ``out`` has its own.

    Returns
    -------
    ``dtype`` [rows, cols]
        On the device of ``data``.

    Raises
    ------
    ValueError
        Unknown type, columns that are no multiple of its block, or a number of bytes that doesn't
        fit the shape.
    """
    if out is None:
        out = _new(data, shape, dtype)
    _core.dequantise(data, kind, out)
    return out


def embedding(
    token_ids: Array,
    table: PackedWeight | Array,
    *,
    scale: float = 1.0,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``scale * table[token_ids] [+ residual]``, dequantised.

    Parameters
    ----------
    token_ids : int32 [num_tokens]
        An id outside the table counts as zeros.
    table : [vocab_size, hidden_size]
        A PackedWeight on the CPU, or float32, float16 or bfloat16 on the device of ``token_ids``.
    residual : float32 [num_tokens, hidden_size]
        ``out`` may be ``residual``.

    Returns
    -------
    float32 [num_tokens, hidden_size]
        Of the residual's dtype where there is one.
    """
    if out is None:
        shape = (_size(token_ids, 0), _size(table, 1))
        out = _new(token_ids, shape) if residual is None else _new_activation(residual, shape)
    _core.embedding(token_ids, table, residual, out, scale)
    return out


def rms_norm(
    x: Array,
    weight: Array,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``x / sqrt(mean(x**2) + eps) * (weight + weight_offset) [+ residual]``, last dimension.

    Parameters
    ----------
    x : float32 [num_tokens, size] or [num_tokens, num_heads, size]
        Token and head strides are free. ``out`` may be ``x`` or ``residual``.
    weight : float32 [size]
    eps : at least 0
    residual : like ``x``

    Returns
    -------
    float32, the shape of ``x``
    """
    if out is None:
        out = _new_like(x)
    _core.rms_norm(x, weight, residual, out, eps, weight_offset)
    return out


def layer_norm(
    x: Array, weight: Array, bias: Array, *, eps: float = 1e-5, out: Array | None = None
) -> Array:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, last dimension.

    Parameters
    ----------
    x : float32 [num_tokens, size]
        ``out`` may be ``x``.
    weight, bias : float32 [size]
    eps : at least 0

    Returns
    -------
    float32 [num_tokens, size]
    """
    if out is None:
        out = _new_like(x)
    _core.layer_norm(x, weight, bias, out, eps)
    return out


def linear(
    x: Array,
    weight: PackedWeight,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    largest_only: bool = False,
) -> Array:
    """``x @ weight.T [+ bias] [+ residual]``.

    Parameters
    ----------
    x : float32 [num_tokens, cols]
    weight : PackedWeight [rows, cols]
        Quantised parts meet ``x`` quantised to int8 per 32 columns; float parts meet it as it is.
        Or a tensor of torch, of the dtype of ``x`` and on its device, such as `dequantise` makes:
        then torch computes, and ``bias`` and ``residual`` have that dtype too.
    bias : float32 [rows]
    residual : float32 [num_tokens, rows]
        ``out`` may be ``residual``.
    largest_only : bool
        Only each token's largest value matters, and where it is, as for a greedy draw. The others
        are then anything from their true value up, below the largest: where few tokens meet Q8_0
        weights that were packed for it, only the upper halves of most rows are read. Not together
        with ``residual``.

    Returns
    -------
    float32 [num_tokens, rows]
        With a tensor as ``weight``, of the dtype of ``x`` unless ``out`` is float32.

    Notes
    -----
    With a PackedWeight, a row of the result is the same bits whatever the other rows are, and
    however many. With a tensor that is up to torch, which chooses a kernel by their number.
    """
    if not isinstance(weight, PackedWeight):
        if largest_only and residual is not None:
            raise ValueError("linear: residual must be None where largest_only is True")
        return _torch_linear(x, weight, bias, residual, out)
    if out is None:
        out = _new(x, (_size(x, 0), _size(weight, 0)))
    _core.linear(x, weight, bias, residual, out, largest_only)
    return out


def _torch_linear(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array | None
) -> Array:
    if not hasattr(weight, "addmm"):  # torch
        kind = type(weight).__name__
        raise TypeError(f"linear: weight must be a PackedWeight or a torch tensor, got {kind}")
    import torch

    for name, array in {"x": x, "bias": bias, "residual": residual, "out": out}.items():
        if not isinstance(array, torch.Tensor) and (name == "x" or array is not None):
            kind = type(array).__name__
            raise TypeError(f"linear: {name} must be a torch tensor, as weight is, got {kind}")
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    product = weight.t()
    if out.dtype != x.dtype:  # sums are kept as they are, in float32
        if x.is_cuda:
            torch.mm(x, product, out_dtype=out.dtype, out=out)
        else:
            torch.mm(x.to(out.dtype), product.to(out.dtype), out=out)
        if bias is not None:
            out += bias
        if residual is not None:
            out += residual
    elif residual is not None:
        torch.addmm(residual, x, product, out=out)
        if bias is not None:
            out += bias
    elif bias is not None:
        torch.addmm(bias, x, product, out=out)
    else:
        torch.mm(x, product, out=out)
    return out


def rope(
    x: Array, positions: Array, inv_freq: Array, *, interleaved: bool = False, scale: float = 1.0
) -> Array:
    """Rotate the first ``2 * len(inv_freq)`` dimensions of every head by its position, in place.

    Parameters
    ----------
    x : float32 [num_tokens, num_heads, head_dim]
        Token and head strides are free.
    positions : int32 [num_tokens]
    inv_freq : float32 [n]
        Angle per position; pair i is dimensions (i, i + n), or (2 i, 2 i + 1) where
        ``interleaved``.
    scale : factor of cosine and sine (YaRN's attention factor)

    Returns
    -------
    ``x``
    """
    _core.rope(x, positions, inv_freq, interleaved, scale)
    return x


def kv_write(k: Array, v: Array, k_pages: Array, v_pages: Array, slots: Array) -> None:
    """Write keys and values into their pages, in place.

    Parameters
    ----------
    k, v : float32 [num_tokens, num_kv_heads, head_dim]
    k_pages, v_pages : float32, float16 or bfloat16 [num_pages, num_kv_heads, page_size, head_dim]
        Each page contiguous, at any distance from the next. float16 saturates at its largest
        finite value.
    slots : int64 [num_tokens]
        ``page * page_size + offset``; a negative slot is skipped.

    Raises
    ------
    ValueError
        A slot beyond the cache.
    """
    _core.kv_write(k, v, k_pages, v_pages, slots)


def attention_prefill(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    seq_lens: Array,
    query_starts: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Array | None = None,
) -> Array:
    """Causal attention of several query tokens per sequence over paged KV.

    Parameters
    ----------
    q : float32 [num_tokens, num_q_heads, head_dim]
        head_dim a multiple of 16 up to 512; num_q_heads a multiple of num_kv_heads.
    k_pages, v_pages : float32, float16 or bfloat16 [num_pages, num_kv_heads, page_size, head_dim]
    page_table : int32 [num_seqs, max_pages]
        Entries beyond a sequence's length are never read.
    seq_lens : int32 [num_seqs]
        Keys of each sequence, this call's tokens included.
    query_starts : int32 [num_seqs + 1]
        Sequence i owns rows query_starts[i]:query_starts[i + 1] of ``q``: its last positions.
    scale : factor of q.k
    window : keys that a query sees, its own included; 0 = all up to its own
    softcap : scores become ``softcap * tanh(score / softcap)``; 0 = off

    Returns
    -------
    float32 [num_tokens, num_q_heads, head_dim]

    Notes
    -----
    A query's result is the same bits in any chunk and batch, and from `attention_decode` (on CUDA
    as long as it sees at most 256 keys). On CUDA, ``q`` of the pages' float16 or bfloat16 goes to
    the tensor cores, which round the softmax weights to that dtype; else all is in float32.
    """
    if out is None:
        out = _new_like(q)
    _core.attention_prefill(
        q, k_pages, v_pages, page_table, seq_lens, query_starts, out, scale, window, softcap
    )
    return out


def attention_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    seq_lens: Array,
    *,
    query_starts: Array | None = None,
    slot_starts: Array | None = None,
    num_slots: Array | None = None,
    visible: Array | None = None,
    slot_positions: Array | None = None,
    positions: Array | None = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Array | None = None,
) -> Array:
    """Attention over paged KV of one query token per sequence, or of the live beams of a search.

    A plain sequence has one query, at its last position. A search has several: all see its prompt
    (and no more keys than that), and each the generated tokens on the way to it, which lie in
    slots in any order and are marked by bits. A key is read once for all of them.

    Parameters
    ----------
    q : float32 [num_rows, num_q_heads, head_dim]
        What is not named here is as in `attention_prefill`.
    page_table : int32 [num_seqs, max_pages]
        Entries that hold neither keys nor slots in use are never read.
    seq_lens : int32 [num_seqs]
        Keys of each sequence, its query's included; of a search, its prompt's.
    query_starts : int32 [num_seqs + 1]
        Sequence i owns rows query_starts[i]:query_starts[i + 1] of ``q``. This and the five below
        are given together, or none of them: then row i belongs to sequence i and none is a search.
    slot_starts : int32 [num_seqs]
        Slot j is key slot_starts[i] + j by the page table; a multiple of page_size, at least
        seq_lens[i]. Not read where num_slots is 0.
    num_slots : int32 [num_seqs], at most 32 * num_words
        0 for a plain sequence.
    visible : uint32 [num_rows, num_words]
        Bit j of word w: the row sees slot 32 w + j (its own token's, for one). Bits of slots
        beyond num_slots count for nothing.
    slot_positions : int32 [num_seqs, 32 * num_words]
        Position of the token in each slot, for ``window``.
    positions : int32 [num_rows]
        Position of each query of a search, at least seq_lens; not read elsewhere.

    Returns
    -------
    float32 [num_rows, num_q_heads, head_dim]
        NaN for a row that sees no key.

    Notes
    -----
    A row is the same bits whatever other rows and sequences are in the call, and whatever is in
    slots that it doesn't see. Tokens in slots are added up in order of slots: the same tokens in
    other slots, or in a plain sequence, give the same up to rounding.
    """
    if out is None:
        out = _new_like(q)
    _core.attention_decode(
        q, k_pages, v_pages, page_table, seq_lens, query_starts, slot_starts, num_slots, visible,
        slot_positions, positions, out, scale, window, softcap,
    )  # fmt: skip
    return out


def gated_activation(x: Array, *, activation: str = "silu", out: Array | None = None) -> Array:
    """``activation(x[:, :size]) * x[:, size:]``.

    Parameters
    ----------
    x : float32 [num_tokens, 2 * size]
        Gate, then up. ``out`` may be ``x[:, :size]``.
    activation : "silu", "gelu" or "gelu_tanh"

    Returns
    -------
    float32 [num_tokens, size]
    """
    if out is None:
        out = _new_activation(x, (_size(x, 0), _size(x, 1) // 2))
    _core.gated_activation(x, out, activation)
    return out


def activation(x: Array, *, activation: str = "gelu", out: Array | None = None) -> Array:
    """``activation(x)``.

    Parameters
    ----------
    x : float32 [num_tokens, size]
        ``out`` may be ``x``.
    activation : "silu", "gelu" or "gelu_tanh"

    Returns
    -------
    float32 [num_tokens, size]
    """
    if out is None:
        out = _new_like(x)
    _core.activation(x, out, activation)
    return out


def softcap(x: Array, cap: float, *, out: Array | None = None) -> Array:
    """``cap * tanh(x / cap)``.

    Parameters
    ----------
    x : float32 [num_rows, size]
        ``out`` may be ``x``.
    cap : above 0

    Returns
    -------
    float32 [num_rows, size]
    """
    if out is None:
        out = _new_like(x)
    _core.softcap(x, out, cap)
    return out


def logprobs(
    logits: Array, token_ids: Array, *, num_top: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Log-probabilities (natural, over the whole vocabulary) of given tokens and of the best ones.

    Parameters
    ----------
    logits : float32 [num_rows, vocab_size]; on CUDA also float16 or bfloat16
    token_ids : int32 [num_rows]
        -1 gives NaN and rank 0, as does a row without a distribution (NaN, or all -inf).
    num_top : 0..vocab_size

    Returns
    -------
    logprobs : float32 [num_rows], of ``token_ids``
    ranks : int32 [num_rows], 1 = best
    top_ids : int32 [num_rows, num_top], best first, ties by lower id
    top_logprobs : float32 [num_rows, num_top]
    """
    num_rows = _size(logits, 0)
    chosen = _new(logits, (num_rows,))
    ranks = _new(logits, (num_rows,), "int32")
    top_ids = _new(logits, (num_rows, num_top), "int32")
    top = _new(logits, (num_rows, num_top))
    _core.logprobs(logits, token_ids, chosen, ranks, top_ids, top)
    return chosen, ranks, top_ids, top


class Sample(NamedTuple):
    """What `sample` draws; all but the tokens are None without ``num_top``."""

    token_ids: Array  # int32 [num_rows]
    logprobs: Array = None  # float32 [num_rows]
    ranks: Array = None  # int32 [num_rows], 1 = best
    top_ids: Array = None  # int32 [num_rows, max_top], best first, ties by lower id
    top_logprobs: Array = None  # float32 [num_rows, max_top]
    log_sums: Array = None  # float64 [num_rows, 2], of the logits as they are, and processed


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    counters: Array,
    allowed: Array | None = None,
    allowed_idx: Array | None = None,
    bias_starts: Array | None = None,
    bias_ids: Array | None = None,
    bias_values: Array | None = None,
    history_starts: Array | None = None,
    history_ids: Array | None = None,
    history_counts: Array | None = None,
    history_last: Array | None = None,
    repetition_penalty: Array | None = None,
    frequency_penalty: Array | None = None,
    presence_penalty: Array | None = None,
    num_top: Array | None = None,
    max_top: int | None = None,
    out: Sample | None = None,
) -> Sample:
    """Draw one token per row: edits, temperature, min-p, top-k, top-p, then the draw.

    The edits of a row x, in float32 and in this order; ``logits`` are never written::

        x[~allowed] = -inf
        x[bias_ids] += bias_values
        x[history_ids] = where(x > 0, x / repetition_penalty, x * repetition_penalty)
        x[history_ids] -= counts * frequency_penalty + (counts > 0) * presence_penalty

    Parameters
    ----------
    logits : float32 [num_rows, vocab_size]; on CUDA also float16 or bfloat16
    temperature : float32 [num_rows], at least 0
        0 is the best token, the lowest id among equals.
    top_k : int32 [num_rows]
        0 or less is off.
    top_p : float32 [num_rows] in [0, 1]
        Mass of what top-k left; 1 is off, 0 the best token only.
    min_p : float32 [num_rows] in [0, 1]
        Least probability relative to the best token's; 0 is off.
    seeds : uint64 [num_rows]
    counters : uint32 [num_rows, 3]
        Prompt index, choice index, position: with the seed, all that the draw depends on.
    allowed : uint32 [num_masks, ceil(vocab_size / 32)]
        Bit i of word w is token 32 w + i.
    allowed_idx : int32 [num_rows]
        Mask of each row, -1 for none.
    bias_starts : int32 [num_rows + 1]
        Row r has the entries bias_starts[r]:bias_starts[r + 1].
    bias_ids, bias_values : int32, float32 [num_biases]
        -inf bans the token.
    history_starts : int32 [num_rows + 1]
    history_ids, history_counts : int32 [num_histories]
        Distinct tokens of the prompt and what followed; how often each was generated.
    history_last : int32 [num_rows]
        A token of each row that was generated once more than its list says, -1 for none.
    repetition_penalty, frequency_penalty, presence_penalty : float32 [num_rows]
        Above 0, and any; 1, 0 and 0 are off.
    num_top : int32 [num_rows]
        Best tokens to report besides the drawn one; -1 for no log-probabilities of this row. They
        are those of ``logits``, before the edits, and the same bits as from `logprobs`.
    max_top : at least the largest of num_top
        Width of the results; the largest itself unless given.

    Returns
    -------
    Sample
        Token -1 where a row holds NaN or has nothing above -inf once edited; logits of +inf share
        the mass equally. What a row didn't ask for is NaN, rank 0 and id -1.

    Notes
    -----
    A row's results are the same bits in any batch. Without ``max_top`` or ``out``, num_top is read,
    which on CUDA waits for the device.
    """
    if out is None:
        num_rows = _size(logits, 0)
        out = Sample(_new(logits, (num_rows,), "int32"))
        if num_top is not None:
            if max_top is None:
                max_top = _largest(num_top)
            out = Sample(
                out.token_ids,
                _new(logits, (num_rows,)),
                _new(logits, (num_rows,), "int32"),
                _new(logits, (num_rows, max_top), "int32"),
                _new(logits, (num_rows, max_top)),
                _new(logits, (num_rows, 2), "float64"),
            )
    _core.sample(
        logits, temperature, top_k, top_p, min_p, seeds, counters, allowed, allowed_idx,
        bias_starts, bias_ids, bias_values, history_starts, history_ids, history_counts,
        history_last, repetition_penalty, frequency_penalty, presence_penalty, num_top, *out,
    )  # fmt: skip
    return out


class BeamStep(NamedTuple):
    """What `beam_step` makes of each group, best first; -1 and NaN beyond a group's last one."""

    parents: Array  # int32 [num_groups, max_beam], index of the beam that is continued
    token_ids: Array  # int32 [num_groups, max_beam]
    logprobs: Array  # float32 [num_groups, max_beam], of the token
    sums: Array  # float64 [num_groups, max_beam, 2]: search score, log-probability
    finished_parents: Array
    finished_token_ids: Array
    finished_logprobs: Array
    finished_sums: Array


def beam_step(
    logits: Array,
    *,
    beam_rows: Array,
    sums: Array,
    group_starts: Array,
    request_starts: Array,
    beam_sizes: Array,
    diversity_strengths: Array,
    allowed: Array | None = None,
    allowed_idx: Array | None = None,
    terminators: Array | None = None,
    terminator_idx: Array | None = None,
    bias_starts: Array | None = None,
    bias_ids: Array | None = None,
    bias_values: Array | None = None,
    max_beam: int | None = None,
) -> BeamStep:
    """Extend the live hypotheses (beams) of several searches by one token, group by group.

    For each request, for each of its groups, with the tokens ``seen`` of the request's earlier
    groups' new live hypotheses::

        candidates = [(s + lp[token] - strength * seen.count(token), beam, token) for beam, token]
        candidates.sort(by score, larger first; then lower beam; then lower token)
        for rank, (beam, token) in enumerate(candidates):
            if token not in terminators of beam: live.append(...)  # until there are beam_size
            elif rank < beam_size: finished.append(...)

    Parameters
    ----------
    logits : float32 [num_rows, vocab_size]; on CUDA also float16 or bfloat16
    beam_rows : int32 [num_beams]
        The row of each beam; several may share one (a search's first step).
    sums : float64 [num_beams, 2]
        Search score s and log-probability l of each beam.
    group_starts : int32 [num_groups + 1]
        Group g has the beams group_starts[g]:group_starts[g + 1], by rank. It may have none left.
    request_starts : int32 [num_requests + 1]
        Request r has the groups request_starts[r]:request_starts[r + 1], in order.
    beam_sizes : int32 [num_groups], at least 1
        Most hypotheses that a group keeps live.
    diversity_strengths : float32 [num_requests], at least 0
    allowed : uint32 [num_allowed, ceil(vocab_size / 32)]
        Token masks: bit i of word w is token 32 w + i. Applied after log-softmax.
    allowed_idx : int32 [num_beams]
        The mask of each beam, -1 for none.
    terminators, terminator_idx : likewise
        The tokens that end a hypothesis; -1 for none.
    bias_starts : int32 [num_beams + 1]
        Beam i has the biases bias_starts[i]:bias_starts[i + 1].
    bias_ids : int32 [num_biases]
    bias_values : float32 [num_biases]
        Added to the beam's logits, before log-softmax; -inf bans a token.
    max_beam : at least the largest of beam_sizes
        Width of the results; the largest itself unless given.

    Returns
    -------
    BeamStep
        A token's log-probability has the bits that `logprobs` gives of the biased row. Logits of
        -inf are no candidates, and neither are those of a row that is all -inf or holds NaN.

    Notes
    -----
    A request's results are the same bits whatever other requests are in the call. Without
    ``max_beam``, beam_sizes are read, which on CUDA waits for the device.
    """
    if max_beam is None:
        max_beam = max(1, _largest(beam_sizes))
    shape = (max(_size(group_starts, 0) - 1, 0), max_beam)

    def results() -> tuple[Array, ...]:
        return (
            _new(logits, shape, "int32"),
            _new(logits, shape, "int32"),
            _new(logits, shape),
            _new(logits, (*shape, 2), "float64"),
        )

    out = BeamStep(*results(), *results())
    _core.beam_step(
        logits, beam_rows, sums, group_starts, request_starts, beam_sizes, diversity_strengths,
        allowed, allowed_idx, terminators, terminator_idx, bias_starts, bias_ids, bias_values, *out,
    )  # fmt: skip
    return out
