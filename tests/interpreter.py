"""Triton's interpreter, without work that it repeats: a third of the time of kernels that call functions."""

from __future__ import annotations


def patch_once() -> None:
    """Calls of device functions do not replace the operations of `triton.language` again.

    The interpreter replaces all of them when a kernel starts, and again for each device function that the kernel calls,
    although they are the interpreter's already.
    """
    from triton import language  # its import reads TRITON_INTERPRET
    from triton.language import core
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function):
        named = [module for module in (language, core) if any(x is module for x in function.__globals__.values())]
        if any(core.is_builtin(module.load) for module in named):
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
