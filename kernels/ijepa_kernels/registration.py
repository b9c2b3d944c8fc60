"""Registration: an op becomes `ijepa::<name>`, which compilers, checkpoint policies and FLOP counters see."""
from __future__ import annotations

from collections.abc import Callable

import torch

from .compat import num_dispatch_modes

_library = torch.library.Library("ijepa", "DEF")


def is_plain_eager() -> bool:
    """Whether no compiler and no dispatch mode is active.

    Eager code then calls an op's body bare, which spares the cost of the registered op.
    """
    return not torch.compiler.is_compiling() and num_dispatch_modes() == 0


def register(
    schema: str,
    body: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `ijepa::<schema>` and returns what to call.

    One body serves every device: it chooses its code with `use_triton`, and runs below autograd. With
    torch.library.triton_op a compiler would see the launches, but opcheck and compilation fail without a GPU.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ijepa::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"ijepa::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.ijepa, name).default
