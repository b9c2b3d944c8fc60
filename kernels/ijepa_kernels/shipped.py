"""How an op file says in which configurations it ships its kernels, for `python -m ijepa_kernels.aot`."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shipped:
    """One kernel as it is launched: what the compiler is told, and what it must make of it.

    Pointers count as 16-byte aligned, as torch's allocations are. A launch specialises integers divisible by 16
    (named in `divisible`), so list what the shapes of a real model give.
    """

    kernel: Any  # a triton.jit function
    signature: dict[str, str]  # argument -> "*fp32", "*bf16", "i32", "fp32", ...: everything that is not a constexpr
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    vector_bytes: int = 16  # the width that the widest global load and store must reach; 0: not asked for
    dot: bool = False  # must use tensor cores
    note: str = ""  # why vector_bytes is below 16, or why it spills and is still the fastest

    def title(self) -> str:
        pointers = [t[1:] for t in self.signature.values() if t.startswith("*")]
        constants = [f"{k}={v}" for k, v in self.constexprs.items() if v is not None]
        return ", ".join([" ".join(pointers), *constants, f"warps={self.num_warps}"])
