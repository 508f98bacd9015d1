# SPDX-License-Identifier: Apache-2.0
"""A tiny language model whose logits depend on every token of the history as read back through
the page table, and a plain loop without pages that says what the engine has to answer."""

from __future__ import annotations

import codecs
from types import SimpleNamespace
from typing import Any

import numpy as np

from fullbeam.engine.batch import Batch
from fullbeam.engine.device import CpuDevice, Device
from fullbeam.params import CompletionParams

PIECES = [b"", b"", b"a", b"b", b"c", b"d", b" ", b"\n", b"ab", b"bc", b"abc", b"cd", b" a", b"dd"]
PIECES += [b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", "é".encode(), "日".encode(), b"e", b"\xff"]
BOS, EOS = 0, 1
VOCAB_SIZE = len(PIECES)
POISON = np.uint64(0xDEADBEEFDEADBEEF)
_U64 = np.uint64


def _mix(values: Any) -> Any:
    with np.errstate(over="ignore"):
        values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


_POWERS = _mix(np.arange(1, 4097, dtype=np.uint64)) | _U64(1)


def _cells(token_ids: Any, positions: Any) -> Any:
    return _mix(np.asarray(token_ids, np.uint64) << _U64(32) | np.asarray(positions, np.uint64))


def _logits(cells: Any) -> Any:
    with np.errstate(over="ignore"):
        state = np.sum(cells * _POWERS[: len(cells)], dtype=np.uint64)
        bits = _mix(state + np.arange(VOCAB_SIZE, dtype=np.uint64) * _U64(0x9E3779B97F4A7C15))
    return (bits >> _U64(40)).astype(np.float32) / np.float32(2**24) * 6 - 3


def history_logits(token_ids: list[int]) -> Any:
    """float32 [VOCAB_SIZE]: what the model says after these tokens."""
    return _logits(_cells(token_ids, np.arange(len(token_ids))))


class FakeTokenizer:
    """Longest match over PIECES."""

    vocab_size = VOCAB_SIZE
    bos_id = BOS
    eos_ids = frozenset({EOS})
    infill = None
    backend = SimpleNamespace(id_to_token=lambda idx: {BOS: "<bos>", EOS: "<eos>"}.get(idx))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        data, ids = text.encode(), [BOS] if add_special_tokens else []
        while data:
            best = max(
                (idx for idx, piece in enumerate(PIECES) if piece and data.startswith(piece)),
                key=lambda idx: len(PIECES[idx]),
            )
            ids.append(best)
            data = data[len(PIECES[best]) :]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]

    def all_token_bytes(self) -> list[bytes]:
        return PIECES


class FakeKv:
    """One hash of (token, position) in each slot."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.cells = np.full((num_pages, page_size), POISON)
        self.num_copies = 0

    def copy_page(self, src: int, dst: int) -> None:
        self.cells[dst] = self.cells[src]
        self.num_copies += 1


class FakeDecoder:
    """Checks every batch, keeps the sizes of all, fails on demand."""

    row_cost = 0.1
    device: Device = CpuDevice(1)

    def __init__(self, context_len: int = 512) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB_SIZE, context_len=context_len)
        self.batches: list[tuple[int, int, int]] = []  # tokens, sequences, logit rows
        self.fail_at: int | None = None  # number of the call that fails
        self.nan_after: int | None = None  # token id after which there is no finite logit
        self.num_calls = 0

    def kv_bytes_per_token(self) -> int:
        return 8

    def allocate_kv(self, num_pages: int, page_size: int) -> FakeKv:
        self.kv = FakeKv(num_pages, page_size)
        return self.kv

    def forward(self, batch: Batch, kv: FakeKv, stop: Any) -> Any:
        self.num_calls += 1
        check_batch(batch, kv.cells.shape)
        self.batches.append((len(batch.token_ids), len(batch.seq_lens), len(batch.logit_rows)))
        flat = kv.cells.reshape(-1)
        token_ids = batch.token_ids
        if batch.drawn is not None:
            token_ids = self.device.merged(token_ids, batch.sources, batch.drawn)
        flat[batch.slots] = _cells(token_ids, batch.positions)
        if self.num_calls == self.fail_at:
            raise FloatingPointError("on demand")
        size = kv.cells.shape[1]
        logits = np.empty((len(batch.logit_rows), VOCAB_SIZE), np.float32)
        owners = np.searchsorted(batch.query_starts, batch.logit_rows, side="right") - 1
        for idx, (row, owner) in enumerate(zip(batch.logit_rows, owners, strict=True)):
            where = keys_of(batch, int(row), int(owner))
            slots = batch.page_table[owner][where // size] * size + where % size
            logits[idx] = _logits(flat[slots])
            if token_ids[row] == self.nan_after:
                logits[idx] = np.nan
        return logits


def keys_of(batch: Batch, row: int, owner: int) -> Any:
    """Indices of the keys that a row sees, in the order of their positions."""
    if owner >= batch.num_decode or batch.num_words == 0 or batch.num_slots[owner] == 0:
        return np.arange(batch.positions[row] + 1)
    length = batch.seq_lens[owner]
    words = batch.visible[row]
    seen = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert (seen < batch.num_slots[owner]).all()
    positions = batch.slot_positions[owner][seen]
    order = np.argsort(positions)
    assert (positions[order] == np.arange(length, batch.positions[row] + 1)).all()
    return np.concatenate([np.arange(length), batch.slot_starts[owner] + seen[order]])


def check_batch(batch: Batch, shape: tuple[int, int]) -> None:
    """Everything that the model may rely on."""
    num_pages, size = shape
    num_tokens, num_seqs = len(batch.token_ids), len(batch.seq_lens)
    kinds = {
        "token_ids": np.int32,
        "positions": np.int32,
        "slots": np.int64,
        "query_starts": np.int32,
        "page_table": np.int32,
        "seq_lens": np.int32,
        "logit_rows": np.int32,
    }
    for name, dtype in kinds.items():
        array = getattr(batch, name)
        assert array.dtype == dtype, name
        assert array.flags.c_contiguous, name
    assert num_seqs > 0
    assert len(batch.positions) == len(batch.slots) == num_tokens == batch.query_starts[-1]
    assert batch.query_starts[0] == 0
    counts = np.diff(batch.query_starts)
    assert (counts >= 1).all()
    has_slots = np.zeros(num_seqs, np.bool_)
    if batch.num_words:
        has_slots[: batch.num_decode] = batch.num_slots > 0
        assert batch.visible.shape == (batch.num_decode_rows, batch.num_words)
        assert batch.slot_positions.shape == (batch.num_decode, 32 * batch.num_words)
        assert not batch.visible[~np.repeat(has_slots, counts)[: batch.num_decode_rows]].any()
    assert (counts[: batch.num_decode][~has_slots[: batch.num_decode]] == 1).all()
    assert (counts[batch.num_decode :] > 1).all()
    assert len(np.unique(batch.slots)) == num_tokens, "two tokens share a slot"
    assert (np.diff(batch.logit_rows) > 0).all()
    for idx in range(num_seqs):
        start, end = batch.query_starts[idx], batch.query_starts[idx + 1]
        length = batch.seq_lens[idx]
        if has_slots[idx]:
            assert batch.slot_starts[idx] >= length
            assert batch.slot_starts[idx] % size == 0
            for row in range(start, end):  # a row's own token is the last that it sees
                own = keys_of(batch, row, idx)[-1]
                assert batch.slots[row] == batch.page_table[idx][own // size] * size + own % size
            continue
        where = np.arange(length - (end - start), length)
        assert (batch.positions[start:end] == where).all()
        used = -(-length // size)
        table = batch.page_table[idx]
        assert (table[:used] >= 0).all()
        assert (table[:used] < num_pages).all()
        assert (table[used:] == -1).all() or length < np.sum(table >= 0) * size
        assert (batch.slots[start:end] == table[where // size] * size + where % size).all()


def answer(
    prompt_ids: list[int], params: CompletionParams, *, prompt_index: int = 0, choice: int = 0
) -> dict[str, Any]:
    """What the engine has to answer, by a plain loop over whole histories."""
    from fullbeam import ops

    assert params.max_tokens is not None
    ids, out, starts, values = list(prompt_ids), [], [], []
    tokenizer = FakeTokenizer()
    ends = set(params.stop_ids) | (set() if params.ignore_eos else tokenizer.eos_ids)
    reason: str = "length"
    stop_reason: str | int | None = None
    text = ""
    while len(out) < params.max_tokens:
        logits = history_logits(ids)[None]
        token_id = int(
            ops.sample(
                edited(logits[0], prompt_ids, out, params, ends)[None],
                temperature=np.float32([params.temperature]),
                top_k=np.int32([params.top_k]),
                top_p=np.float32([params.top_p]),
                min_p=np.float32([params.min_p]),
                seeds=np.uint64([(params.seed or 0) % 2**64]),
                counters=np.uint32([[prompt_index, choice, len(ids)]]),
            ).token_ids[0]
        )
        values.append(float(ops.logprobs(logits, np.int32([token_id]))[0][0]))
        ids.append(token_id)
        out.append(token_id)
        if token_id in ends:
            text = shown(out if params.include_stop_str_in_output else out[:-1], params, final=True)
            starts.append(len(shown(out[:-1], params, final=not params.include_stop_str_in_output)))
            reason, stop_reason = "stop", token_id if token_id in params.stop_ids else None
            break
        starts.append(len(text))
        text = shown(out, params)
        first = len(params.prefix)
        found = [(text.find(stop, first), rank) for rank, stop in enumerate(params.stop_strings)]
        found = [item for item in found if item[0] >= 0]
        if found:
            cut, rank = min(found)
            reason, stop_reason = "stop", params.stop_strings[rank]
            text = text[: cut + len(stop_reason) * params.include_stop_str_in_output]
            break
    kept = len(out)
    if isinstance(stop_reason, str):
        kept = sum(start < len(text) for start in starts)
    elif reason == "length":
        text = shown(out, params, final=True)
    return {
        "text": text,
        "token_ids": out[:kept],
        "finish_reason": reason,
        "stop_reason": stop_reason,
        "num_tokens": len(out),
        "starts": starts[:kept],
        "token_logprobs": values[:kept],
        "mean": sum(values) / max(1, len(values)),
    }


def edited(
    logits: Any, prompt_ids: list[int], out: list[int], params: CompletionParams, ends: set[int]
) -> Any:
    """The logits that a token is drawn from, before temperature."""
    logits = logits.copy()
    text = b"".join(PIECES[idx] for idx in out)
    prefix = params.prefix.encode()
    bad_words = [word.encode() for word in params.bad_strings]
    for token_id in range(VOCAB_SIZE):
        after = text + PIECES[token_id]
        if (
            (params.allowed_ids and token_id not in params.allowed_ids)
            or (token_id in ends and len(out) < params.min_tokens)
            or any(word in after[len(prefix) :] for word in bad_words)
            or (len(text) < len(prefix) and after == text)
            or after[: len(prefix)] != prefix[: len(after)]
        ):
            logits[token_id] = -np.inf
    for token_id, value in params.biases:
        logits[token_id] += np.float32(value)
    penalty = np.float32(params.repetition_penalty)
    for token_id in {*prompt_ids, *out}:
        if logits[token_id] > 0:
            logits[token_id] /= penalty
        else:
            logits[token_id] *= penalty
    for token_id in set(out):
        count = np.float32(out.count(token_id))
        frequency, presence = np.float32([params.frequency_penalty, params.presence_penalty])
        logits[token_id] -= count * frequency + presence
    return logits


def shown(token_ids: list[int], params: CompletionParams, *, final: bool = False) -> str:
    """The text of generated tokens, but for a character that is not complete yet."""
    names = {} if params.skip_special_tokens else {BOS: b"<bos>", EOS: b"<eos>"}
    data = b"".join(names.get(idx, PIECES[idx]) for idx in token_ids)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)
