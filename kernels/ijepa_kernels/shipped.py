"""How an op file says in which configurations it ships its kernels, for `python -m ijepa_kernels.aot`."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PACKED_POINTERS = ("indices_ptr", "cu_seqlens_ptr", "image_ptr")  # the int32 fields of a `Packed`


@dataclass(frozen=True)
class Shipped:
    """One kernel as it is launched: what the compiler is told, and what it must make of it.

    Pointers count as 16-byte aligned, as torch's allocations are. A launch specialises integers divisible by 16
    (named in `divisible`), so list what the shapes of a real model give.
    """

    kernel: Any  # a triton.jit function
    types: dict[str, str]  # argument -> "bf16", "i64", ...: a number, or what a pointer points to; see `signature`
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    vector_bytes: int = 16  # the width that the widest global load and store must reach; 0: not asked for
    dot: bool = False  # must use tensor cores
    first_arch: int = 80  # the oldest chip that it can be compiled for
    note: str = ""  # why vector_bytes is below 16, or why it spills and is still the fastest

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of every argument that is no constexpr, in the kernel's order: "*bf16", "i32", "fp32", ...

        Where `types` has none, a pointer to a field of a `Packed` is an int32 one, and a number is an int32.
        """
        names = self.kernel.arg_names
        unknown = (set(self.types) | set(self.constexprs)) - set(names)
        if unknown:
            raise ValueError(f"{self.kernel.__name__} has no argument {', '.join(sorted(unknown))}")
        signature = {}
        for name in names:
            if name in self.constexprs:
                continue
            if not name.endswith("_ptr"):
                if name.isupper():
                    raise ValueError(f"{self.kernel.__name__}: the constexpr {name} has no value")
                signature[name] = self.types.get(name, "i32")
            elif name in self.types or name.endswith(PACKED_POINTERS):
                signature[name] = "*" + self.types.get(name, "i32")
            else:
                raise ValueError(f"{self.kernel.__name__}: the pointer {name} has no type")
        return signature

    def title(self) -> str:
        pointers = [t[1:] for t in self.signature.values() if t.startswith("*")]
        constants = [f"{k}={v}" for k, v in self.constexprs.items() if v is not None]
        return ", ".join([" ".join(pointers), *constants, f"warps={self.num_warps}"])
