# SPDX-License-Identifier: Apache-2.0
"""A source's tensors -> Weights: shapes checked, matrices packed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fullbeam.engine.batch import FloatArray
from fullbeam.engine.device import Device, Packing
from fullbeam.models.config import DecoderConfig, LayerWeights, Linear, Matrix, Norm, Weights
from fullbeam.models.source import Source, Tensor
from fullbeam.ops import Array


class WeightReader:
    """Takes tensors out of a source, checking their shapes, and lets its pages go."""

    def __init__(
        self,
        source: Source,
        device: Device,
        packing: Packing,
        progress: Callable[[int], None],
    ) -> None:
        self._source = source
        self._device = device
        self._packing = packing
        self._progress = progress

    def has(self, name: str) -> bool:
        return name in self._source.tensors

    def matrix(self, *parts: tuple[str, int, int], largest_only: bool = False) -> Matrix:
        """Stack tensors (name, rows, cols) by rows; packed, at the latest, with the packing.

        `largest_only`: see `ops.pack_weight`.
        """
        tensors = [self._find(name, (rows, cols)) for name, rows, cols in parts]
        try:
            arrays = [(t.data, t.type, (t.shape[0], t.shape[1])) for t in tensors]
            if self._source.is_mapped:
                weight = self._packing.add(arrays, release=True, largest_only=largest_only)
                self._progress(0)
                return weight
            weight = self._device.pack(arrays, largest_only)
        except ValueError as error:
            names = ", ".join(tensor.name for tensor in tensors)
            raise ValueError(f"{self._source.path}: tensor {names}: {error}") from error
        for tensor in tensors:
            self._source.release(tensor)
        self._progress(sum(tensor.num_bytes for tensor in tensors))
        return weight

    def vector(self, name: str, size: int) -> Array:
        return self._device.upload(self._values(name, size))

    def _values(self, name: str, size: int) -> FloatArray:
        tensor = self._find(name, (size,))
        if tensor.type == "F32":
            values = tensor.data.view(np.float32).astype(np.float32)
        elif tensor.type == "F16":
            values = tensor.data.view(np.float16).astype(np.float32)
        elif tensor.type == "BF16":
            values = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            raise ValueError(
                f"{self._source.path}: tensor {tensor.name} must be F32, F16 or BF16, "
                f"got {tensor.type}"
            )
        self._source.release(tensor)
        return values

    def optional_vector(self, name: str, size: int) -> Array | None:
        return self.vector(name, size) if self.has(name) else None

    def linear(self, cols: int, *parts: tuple[str, int]) -> Linear:
        """Stack tensors (name without ending, rows) and their biases, if the first has one."""
        weight = self.matrix(*((f"{name}.weight", rows, cols) for name, rows in parts))
        if not self.has(f"{parts[0][0]}.bias"):
            return Linear(weight)
        biases = [self._values(f"{name}.bias", rows) for name, rows in parts]
        return Linear(weight, self._device.upload(np.concatenate(biases), self._device.dtype))

    def norm(self, name: str, size: int) -> Norm:
        return Norm(self.vector(f"{name}.weight", size), self.optional_vector(f"{name}.bias", size))

    def _find(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._source.tensors.get(name)
        if tensor is None:
            name = self._source.name_of(name)
            raise ValueError(f"{self._source.path}: tensor {name} must be present, got none")
        if tensor.shape != shape:
            raise ValueError(
                f"{self._source.path}: tensor {tensor.name} must be {list(shape)}, "
                f"got {list(tensor.shape)}"
            )
        return tensor


def read_weights(
    source: Source,
    config: DecoderConfig,
    device: Device,
    packing: Packing,
    progress: Callable[[int], None],
) -> Weights:
    """Return a model's weights, which may be used once the packing is done.

    ``progress`` is told of bytes that were packed at once instead.
    """
    reader = WeightReader(source, device, packing, progress)
    hidden, vocab = config.hidden_size, config.vocab_size
    is_tied = not reader.has("output.weight")
    embedding = reader.matrix(("token_embd.weight", vocab, hidden), largest_only=is_tied)
    head, positions = embedding, None
    if not is_tied:
        head = reader.matrix(("output.weight", vocab, hidden), largest_only=True)
    if config.ropes[0] is None:
        positions = reader.matrix(("position_embd.weight", config.context_len, hidden))
    return Weights(
        embedding=embedding,
        layers=tuple(_read_layer(reader, config, f"blk.{i}.") for i in range(config.num_layers)),
        output_norm=reader.norm("output_norm", hidden),
        head=head,
        positions=positions,
    )


def _read_layer(reader: WeightReader, config: DecoderConfig, blk: str) -> LayerWeights:
    hidden, ffn, dim = config.hidden_size, config.ffn_size, config.head_dim
    q_size, kv_size = config.num_q_heads * dim, config.num_kv_heads * dim
    qkv = [(f"{blk}attn_q", q_size), (f"{blk}attn_k", kv_size), (f"{blk}attn_v", kv_size)]
    if reader.has(f"{blk}attn_qkv.weight"):
        qkv = [(f"{blk}attn_qkv", q_size + 2 * kv_size)]
    up = [(f"{blk}ffn_up", ffn)]
    if config.is_gated:
        is_fused = not reader.has(f"{blk}ffn_gate.weight")
        up = [(f"{blk}ffn_up", 2 * ffn)] if is_fused else [(f"{blk}ffn_gate", ffn), *up]
    return LayerWeights(
        attention_norm=reader.norm(f"{blk}attn_norm", hidden),
        qkv=reader.linear(hidden, *qkv),
        q_norm=reader.optional_vector(f"{blk}attn_q_norm.weight", dim),
        k_norm=reader.optional_vector(f"{blk}attn_k_norm.weight", dim),
        attention_out=reader.linear(q_size, (f"{blk}attn_output", hidden)),
        post_attention_norm=reader.optional_vector(f"{blk}post_attention_norm.weight", hidden),
        ffn_norm=reader.norm(f"{blk}ffn_norm", hidden),
        up=reader.linear(hidden, *up),
        down=reader.linear(ffn, (f"{blk}ffn_down", hidden)),
        post_ffn_norm=reader.optional_vector(f"{blk}post_ffw_norm.weight", hidden),
    )
