import pytest
import torch
from ijepa_kernels import Packed


def test_from_masks_keeps_the_rows_of_cat_over_gather():
    masks = [torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 2, 5], [0, 4, 5]])]
    packed = Packed.from_masks(masks, 6)
    assert packed.indices.tolist() == [0, 3, 1, 2, 1, 2, 5, 0, 4, 5]
    assert packed.cu_seqlens.tolist() == [0, 2, 4, 7, 10]
    assert packed.image.tolist() == [0, 1, 0, 1]
    assert packed.max_seqlen == 6
    assert {t.dtype for t in packed[:3]} == {torch.int32}


def test_from_masks_of_no_patches():
    packed = Packed.from_masks([torch.empty(2, 0, dtype=torch.int64)], 4)
    assert packed.cu_seqlens.tolist() == [0, 0, 0]
    assert packed.indices.dtype == torch.int32


def test_dense_is_every_patch():
    packed = Packed.dense(2, 3)
    assert packed.indices.tolist() == [0, 1, 2, 0, 1, 2]
    assert packed.cu_seqlens.tolist() == [0, 3, 6]
    assert packed.image.tolist() == [0, 1]
    assert packed.max_seqlen == 3
    assert {t.dtype for t in packed[:3]} == {torch.int32}


def test_rows_follow_image_whatever_its_order():
    packed = Packed(
        torch.tensor([0, 4, 1, 2, 3], dtype=torch.int32),
        torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        torch.tensor([2, 1, 0], dtype=torch.int32),
        5,
    )
    assert packed.rows(5).tolist() == [10, 14, 1, 2, 3]


def test_to_the_same_device_copies_nothing():
    packed = Packed.dense(2, 3)
    assert packed.to("cpu") is packed


def test_to_moves_one_buffer_of_aligned_parts():
    packed = Packed.from_masks([torch.arange(35).expand(3, 35)], 64)
    moved = packed.to("meta")
    assert [t.shape for t in moved[:3]] == [t.shape for t in packed[:3]]
    assert moved.max_seqlen == 64
    assert len({t.untyped_storage()._cdata for t in moved[:3]}) == 1
    assert all(t.storage_offset() * t.itemsize % 64 == 0 for t in moved[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("non_blocking", [False, True])
def test_to_cuda_and_back(non_blocking):
    packed = Packed.from_masks([torch.arange(35).expand(3, 35), torch.arange(7).expand(3, 7)], 64)
    moved = packed.to("cuda", non_blocking=non_blocking)
    torch.cuda.synchronize()
    for there, here in zip(moved[:3], packed[:3], strict=True):
        assert there.is_cuda
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize(
    ("masks", "max_seqlen", "message"),
    [
        ([], 4, "masks: want a non-empty list"),
        (torch.zeros(2, 3, dtype=torch.int64), 4, "masks: want a non-empty list"),
        ([torch.zeros(2, 3)], 4, r"masks\[0\]: .*\[B, K\] tensor, got float32"),
        ([torch.zeros(3, dtype=torch.int64)], 4, r"masks\[0\]: .* got int64 \[3\]"),
        ([torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)], 4, "want 2 rows as .* got 1"),
        ([torch.zeros(2, 5, dtype=torch.int64)], 4, "want at most max_seqlen = 4 columns, got 5"),
        ([torch.zeros(2, 3, dtype=torch.int64)], None, "max_seqlen: want an int, got NoneType"),
        ([torch.zeros(2, 3, dtype=torch.int64)], 4.0, "max_seqlen: want an int, got 4.0"),
    ],
)
def test_from_masks_refuses(masks, max_seqlen, message):
    with pytest.raises(ValueError, match=message):
        Packed.from_masks(masks, max_seqlen)


def test_what_all_batches_have_in_common_lies_at_the_same_places():
    """A compiler sees a view's offset: were it to follow the number of tokens, it could mistake it for another size."""
    offsets = set()
    for tokens in (5, 16, 17, 40):
        packed = Packed.from_masks([torch.arange(tokens)[None], torch.arange(tokens)[None]], 64)
        offsets.add(tuple(x.storage_offset() for x in packed.to("meta")[:3]))
    assert len(offsets) == 1
