"""Derivatives that implementations by tiles do not have, and a word on who has them."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

ADVICE = 'pass implementation="dense", which has derivatives of every order and mode'


def reverse_once(tree: Any) -> Any:
    """Return arrays as they are; reverse-mode differentiation through them raises, and says why.

    It is for what a backward pass returns, whose loops over tiles have no transpose: their own
    message would tell of loops. Forward mode, as in `jax.jvp(jax.grad(f), ...)`, passes.
    """
    return jax.tree.map(_reverse_once.bind, tree)


@jax.custom_jvp
def only_once(tree: Any) -> Any:
    """Return arrays as they are; differentiation through them, in any mode, raises and says why.

    It is for what the kernels of both passes get, which have no derivative: that of the forward
    pass is asked for where a gradient is differentiated.
    """
    return tree


@only_once.defjvp
def _only_once_jvp(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"attention by kernels has no derivative of its gradient: {ADVICE}, or "
        'implementation="blockwise", which has second ones in forward mode, jax.jvp of jax.grad'
    )


def _refuse(cotangent: Any, x: Any) -> Any:
    raise NotImplementedError(
        f"attention by tiles has no reverse-mode derivative of its gradient: {ADVICE}, or take the "
        "second derivative in forward mode, jax.jvp of jax.grad"
    )


_reverse_once = Primitive("reverse_once")
_reverse_once.def_impl(lambda x: x)
_reverse_once.def_abstract_eval(lambda x: x)
ad.deflinear2(_reverse_once, _refuse)
batching.defvectorized(_reverse_once)
mlir.register_lowering(_reverse_once, lambda context, x: [x])
