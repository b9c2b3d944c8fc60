"""The code in kernels/README.md runs, top to bottom; the lines for foreign loops give those loops' own results."""
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

README = Path(__file__).parents[2] / "kernels/README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def namespace() -> dict:
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        if not block.startswith("# loop"):
            exec(compile(block, str(README), "exec"), names)
    return names


def test_examples_run(namespace):
    assert namespace["out"].shape == (8, 2, 64)


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("loop", ["i-jepa", "v-jepa"])
def test_lines_for_a_released_loop_compute_its_loss(namespace, loop, contexts):
    (block,) = [block for block in BLOCKS if block.startswith(f"# loop: {loop}")]
    masks = [torch.stack([torch.randperm(16)[:5].sort()[0] for _ in range(2)]) for _ in range(3)]
    h = torch.randn(2, 16, 192)
    normalised = F.layer_norm(h, (192,))
    picked = [normalised.gather(1, m[..., None].expand(-1, -1, 192)) for m in masks]
    if loop == "i-jepa":
        z = torch.randn(3 * contexts * 2, 5, 192)  # by target mask, by context, by image
        want = F.smooth_l1_loss(z, torch.cat([p for p in picked for _ in range(contexts)]))
    else:
        z = [torch.randn(2, 5, 192) for _ in masks]
        want = sum((a - b).abs().mean() for a, b in zip(z, picked, strict=True)) / 3
    loop_names = dict(z=z, h=h, masks_pred=masks, masks_enc=[None] * contexts, m=0.9)
    before, source = (namespace[name].weight.clone() for name in ("target_encoder", "encoder"))
    exec(compile(block, str(README), "exec"), namespace | loop_names, result := {})
    torch.testing.assert_close(result["loss"], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(namespace["target_encoder"].weight, before.lerp(source, 1 - 0.9), rtol=1e-6, atol=1e-6)
