"""One function of one package: inputs, caches, the layers between them, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ane.convert.architecture import Architecture, Layer
from ane.convert.blocks import Blocks
from ane.convert.constants import Constants, builder, mil_types
from ane.convert.layout import Chunk, caches
from ane.convert.options import Options
from ane.convert.positions import ModelPositions, host_inputs, host_masks
from ane.convert.source import Source
from ane.runtime.kv import Cache
from mlxkd.runtime import import_coremltools


class FunctionBuilder:
    """Builds the MIL of one function.

    Args:
        arch, source, constants: the model, its weights, the package's constants.
        chunk: the part of the model. options: resolved choices.
        batch, query: rows and tokens per call.
    """

    def __init__(
        self,
        arch: Architecture,
        source: Source,
        constants: Constants,
        chunk: Chunk,
        options: Options,
        batch: int,
        query: int,
    ):
        self.arch, self.chunk, self.options = arch, chunk, options
        self.batch, self.query = batch, query
        self.mb, self.types = builder(), mil_types()
        self.caches = caches(arch, chunk, options)
        self.layers = arch.layers[chunk.start : chunk.stop]
        convolutions = options.profile == "ane"
        self.blocks = Blocks(arch, source, constants, convolutions=convolutions, batch=batch, query=query)
        self.new_pairs: dict[str, list[Any]] = {cache.name: [] for cache in self.caches}

    def build(self) -> Any:
        """The MIL function."""
        from coremltools.converters.mil.mil import Function

        target = getattr(import_coremltools().target, self.options.target)
        with Function(self._placeholders(), opset_version=target) as function:
            inputs = function.inputs
            x = self._enter(inputs)
            self._prepare_positions(inputs)
            for offset in range(len(self.layers)):
                x = self.blocks.layer(x, self.chunk.start + offset, self._attention(offset, inputs))
            outputs = [*self._leave(x), *self._new_caches()]
            function.set_outputs(outputs)
        return function

    # Inputs ----------------------------------------------------------------------------------------------

    def _placeholders(self) -> dict[str, Any]:
        from coremltools.converters.mil.mil.program import StateTensorPlaceholder

        mb, types, arch = self.mb, self.types, self.arch
        half, whole = types.fp16, types.int32
        embeds = self.chunk.first and self.options.embedding == "model"
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        if embeds:
            shapes["tokens"] = ((self.batch, self.query), whole)
        else:
            shapes["hidden"] = ((self.batch, 1, self.query, arch.hidden), half)
        if self.options.positions == "host":
            shapes |= {
                name: (shape, whole if name in ("position", "slot") else half)
                for name, shape in host_inputs(arch, self.layers, self.caches, self.options, self.batch, self.query)
            }
        elif self.layers:
            shapes["position"] = ((self.batch,), whole)
        states = {f"{c.name}_b{self.batch}": c.shape(self.batch) for c in self.caches}
        if self.options.kv == "explicit":
            shapes |= {name: (shape, half) for name, shape in states.items()}
            states = {}
        placeholders = {name: mb.placeholder(shape, dtype) for name, (shape, dtype) in shapes.items()}
        return placeholders | {name: StateTensorPlaceholder(shape, half) for name, shape in states.items()}

    def _enter(self, inputs: dict[str, Any]) -> Any:
        """The residual stream in the profile's arrangement."""
        mb = self.mb
        if "tokens" in inputs:
            table = self.blocks.matrix("model.embed_tokens")
            # Negative or too large ids cannot occur: the session checks them, so no guards around the gather.
            x = mb.gather(x=table, indices=inputs["tokens"], axis=0, validate_indices=False)
            if self.arch.embedding_scale != 1.0:
                x = mb.mul(x=x, y=np.float16(self.arch.embedding_scale))
            x = mb.reshape(x=x, shape=[self.batch, 1, self.query, self.arch.hidden])
        else:
            x = inputs["hidden"]
        if self.options.profile == "ane":
            return mb.transpose(x=x, perm=[0, 3, 1, 2])
        return mb.squeeze(x=x, axes=[1])

    def _prepare_positions(self, inputs: dict[str, Any]) -> None:
        """Rotary tables by number, masks by cache, and the first slot of each row by cache."""
        if not self.layers:
            return
        if self.options.positions == "host":
            self.tables, self.masks, self.starts = host_masks(self.arch, self.layers, self.caches, inputs)
        else:
            model = ModelPositions(self.arch, self.options, self.batch, self.query, inputs["position"])
            self.tables = model.tables({layer.rotary for layer in self.layers})
            self.masks = {cache.name: model.mask(cache) for cache in self.caches}
            self.starts = {cache.name: model.slots(cache) for cache in self.caches}
        self._stores = {
            cache.name: Store(self, cache, inputs[f"{cache.name}_b{self.batch}"], self.starts[cache.name])
            for cache in self.caches
        }

    # Layers ----------------------------------------------------------------------------------------------

    def _attention(self, offset: int, inputs: dict[str, Any]) -> Callable[[Any, str, Layer], Any]:
        layer = self.layers[offset]
        cache = next(c for c in self.caches if c.window == layer.window)
        place = sum(other.window == layer.window for other in self.layers[:offset])

        def attend(x: Any, path: str, layer: Layer) -> Any:
            queries, keys, values = self.blocks.queries_keys_values(x, path, layer, self.tables)
            pairs = self._stores[cache.name].extend(place, keys, values)
            return self.blocks.merge_heads(self.blocks.attend(queries, pairs, self.masks[cache.name]))

        return attend

    # Outputs ---------------------------------------------------------------------------------------------

    def _new_caches(self) -> list[Any]:
        if self.options.kv == "state":
            return []
        stores = [self._stores[cache.name] for cache in self.caches]
        return [self._concat(s.new, 0, f"new_{s.cache.name}_b{self.batch}") for s in stores]

    def _concat(self, values: list[Any], axis: int, name: str) -> Any:
        if len(values) == 1:
            return self.mb.identity(x=values[0], name=name)
        return self.mb.concat(values=values, axis=axis, name=name)

    def _leave(self, x: Any) -> list[Any]:
        if self.chunk.splits:
            return self._head(self.blocks.norm(x, "model.norm"))
        if self.options.profile == "ane":
            return [self.mb.transpose(x=x, perm=[0, 2, 3, 1], name="hidden_out")]
        return [self.mb.expand_dims(x=x, axes=[1], name="hidden_out")]

    def _head(self, x: Any) -> list[Any]:
        """Logits [batch, tokens, width] of each split, or the best token of each and its score."""
        arch, mb = self.arch, self.mb
        path = head_path(arch)
        outputs = []
        splits = head_rows(arch.vocab, self.options.head_width or 0)
        for i in self.chunk.splits:
            rows = splits[i]
            logits = self.blocks.project(x, path, rows=rows if rows != (0, arch.vocab) else None)
            if arch.logit_softcap:
                logits = self.blocks.softcap(logits, arch.logit_softcap)
            if self.options.profile == "ane":
                # Tokens last would leave one element in the last axis, which the Neural Engine pads 32 times.
                logits = mb.squeeze(x=mb.transpose(x=logits, perm=[0, 2, 3, 1]), axes=[1])
            if self.options.head == "argmax":
                outputs.append(mb.reduce_argmax(x=logits, axis=-1, keep_dims=False, name=f"token_{i}"))
                outputs.append(mb.reduce_max(x=logits, axes=[-1], keep_dims=False, name=f"score_{i}"))
            else:
                outputs.append(mb.identity(x=logits, name=f"logits_{i}"))
        return outputs


class Store:
    """One cache inside a function: takes the new keys and values of a layer, gives all that may be attended.

    Args:
        build: the function. cache: its description. value: the state or input. starts: first slot of each row.
    """

    def __init__(self, build: FunctionBuilder, cache: Cache, value: Any, starts: list[Any]):
        self.mb, self.batch, self.query = build.mb, build.batch, build.query
        self.cache, self.value, self.constants = cache, value, build.blocks.constants
        self.explicit = build.options.kv == "explicit"
        self.current = value if self.explicit else self.mb.read_state(input=value)
        self.new: list[Any] = []
        self.spans = [(start, self.mb.add(x=start, y=np.int32(self.query))) for start in starts]

    def extend(self, layer: int, keys: Any, values: Any) -> list[tuple[Any, Any]]:
        """(keys, values) pairs, in the order in which the mask lists their keys."""
        packed = self._pack(keys, values)
        if self.explicit:
            self.new.append(packed)
            return [self._read(layer), (keys, values)]
        for row in range(self.batch):
            self._write(layer, row, packed)
        return [self._read(layer)]

    def _pack(self, keys: Any, values: Any) -> Any:
        """[2 * batch, kv_heads, tokens, width]: a row's keys, then its values, then the next row's."""
        mb, cache = self.mb, self.cache
        packed = mb.stack(values=[keys, values], axis=1)
        packed = mb.reshape(x=packed, shape=[2 * self.batch, cache.kv_heads, self.query, cache.head_dim])
        if cache.width == cache.head_dim:
            return packed
        shape = (*packed.shape[:-1], cache.width - cache.head_dim)
        spare = self.constants.var(f"zeros.{shape}", shape, np.dtype(np.float16), lambda: np.zeros(shape, np.float16))
        return mb.concat(values=[packed, spare], axis=-1)

    def _write(self, layer: int, row: int, packed: Any) -> None:
        """Write one row at its own slot: the chain of operations that the Neural Engine takes for a state."""
        mb, index, (start, stop) = self.mb, 2 * (layer * self.batch + row), self.spans[row]
        update = packed
        if self.batch > 1:
            shape = list(packed.shape)
            update = mb.slice_by_index(x=packed, begin=[2 * row, 0, 0, 0], end=[2 * row + 2, *shape[1:]])
        zero = np.array([0], np.int32)
        begin = mb.concat(values=[np.array([index, 0], np.int32), start, zero], axis=0)
        end = mb.concat(values=[np.array([index + 2, 0], np.int32), stop, zero], axis=0)
        written = mb.slice_update(
            x=self.current,
            update=update,
            begin=begin,
            end=end,
            stride=[1] * 4,
            begin_mask=[False] * 4,
            end_mask=[False, True, False, True],
            squeeze_mask=[False] * 4,
        )
        self.current = mb.coreml_update_state(state=self.value, value=written)

    def _read(self, layer: int) -> tuple[Any, Any]:
        """Keys and values of a layer, [batch, kv_heads, slots, head_dim] each."""
        cache, first = self.cache, 2 * layer * self.batch

        def part(offset: int) -> Any:
            stop = first + 2 * self.batch
            stride = {"stride": [2, 1, 1, 1]} if self.batch > 1 else {}
            return self.mb.slice_by_index(
                x=self.current,
                begin=[first + offset, 0, 0, 0],
                end=[stop if self.batch > 1 else first + offset + 1, cache.kv_heads, cache.slots, cache.head_dim],
                **stride,
            )

        return part(0), part(1)


def head_rows(vocab: int, width: int) -> list[tuple[int, int]]:
    """Row ranges of the head's splits."""
    step = width or vocab
    return [(start, min(start + step, vocab)) for start in range(0, vocab, step)]


def head_path(arch: Architecture) -> str:
    """Path of the matrix that makes logits."""
    return "model.embed_tokens" if arch.tied else "lm_head"
