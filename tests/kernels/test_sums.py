"""column_sum: against float64 on every path, the programs that share the work, and what autograd asks of an op."""
import pytest
import torch
from ijepa_kernels import sums
from ijepa_kernels.sums import _op, blocks_of, column_sum, column_sum_ref, shares_of
from op_proofs import assert_compiles_once, forbidden_sync, guarded_outputs

B, F, H = torch.bfloat16, torch.float32, torch.float16
MULTIPROCESSORS = 132  # of an H100


def matrix(device, rows=70, dim=192, dtype=F):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)) + 0.5  # the sums are not near 0
    return x.to(device, dtype)


def assert_matches(x):
    got, want = column_sum(x), x.detach().cpu().double().sum(0)
    assert (got.dtype, got.shape, got.device) == (F, want.shape, x.device)
    # Summed in any order, n terms are off by at most n roundings, each of 2^-24 of the sum of magnitudes. The tree of
    # the sums makes far fewer of them, but more than one.
    limit = len(x) * 2**-24 * x.detach().cpu().double().abs().sum(0)
    assert bool(((got.cpu().double() - want).abs() <= limit).all())


@pytest.mark.parametrize("dim", [1, 63, 192, 384, 576, 1280])
def test_every_width_matches_float64(device, dim):
    assert_matches(matrix(device, dim=dim, dtype=B))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [768, 1152, 1408, 3840, 4224, 6144])
def test_the_widths_of_models_match_float64(device, dim):
    assert_matches(matrix(device, rows=2000, dim=dim, dtype=B))


@pytest.mark.parametrize("dtype", [B, F, H])
def test_every_dtype_matches_float64_on_the_same_values(device, dtype):
    assert_matches(matrix(device, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 197])
def test_every_number_of_rows(device, rows):
    """One program, with no second stage; whole and cut tiles of two and more."""
    assert_matches(matrix(device, rows=rows, dim=64))


def test_more_rows_than_the_programs_take_at_once(device, monkeypatch):
    monkeypatch.setattr(sums, "PROGRAMS", 6)
    assert shares_of(300, 192) == 2
    assert_matches(matrix(device, rows=300))


def test_more_partial_sums_than_a_tile_of_the_second_stage(device, monkeypatch):
    monkeypatch.setattr(sums, "MOST_ROWS", 1)
    assert shares_of(300, 64) == 300 > 2 * sums.LAST_ROWS
    assert_matches(matrix(device, rows=300, dim=64))


@pytest.mark.parametrize("dim", [192, 384, 576, 768, 1024, 1152, 1280, 1408, 2304, 3072, 3840, 4224, 6144])
@pytest.mark.parametrize("rows", [2000, 8000, 33000])
def test_programs_fill_the_chip_and_leave_few_partial_sums(rows, dim):
    blocks, shares = blocks_of(dim), shares_of(rows, dim)
    assert MULTIPROCESSORS <= blocks * shares <= sums.PROGRAMS
    assert shares * dim * 4 <= 0.2 * rows * dim * 2  # bytes of partial sums, beside those of a bf16 matrix
    assert dim % sums._block(dim) == 0  # no lane idles


def test_no_rows_and_no_columns(device):
    assert torch.equal(column_sum(matrix(device, rows=0)).cpu(), torch.zeros(192))
    assert column_sum(torch.empty(5, 0, device=device)).shape == (0,)


def test_strided_and_expanded_inputs(device):
    x = matrix(device, rows=192, dim=70, dtype=B)
    assert_matches(x.t())
    assert_matches(x[::2, 3:40])
    assert_matches(x[:1].expand(40, -1))


def test_a_nan_and_an_infinity_reach_their_sums_alone(device):
    x = matrix(device, dtype=B)
    x[3, 5], x[60, 7] = float("nan"), float("inf")
    got = column_sum(x).cpu()
    assert got.isnan().nonzero().flatten().tolist() == [5]
    assert got.isinf().nonzero().flatten().tolist() == [7]


def test_writes_only_its_outputs(kernel_device, monkeypatch):
    with guarded_outputs(monkeypatch):
        assert_matches(matrix(kernel_device, dim=63))


def test_two_runs_are_bitwise_equal(reproducible_device):
    x = matrix(reproducible_device, rows=300, dtype=B)
    assert torch.equal(column_sum(x), column_sum(x))


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    x = matrix("cpu", 3, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(column_sum, (x,))
    assert torch.autograd.gradgradcheck(lambda x: column_sum(x * x), (x,))


def test_the_gradient_has_the_dtype_of_the_input(device):
    x = matrix(device, rows=40, dtype=B).requires_grad_()
    weights = matrix(device, rows=1)[0]
    (column_sum(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights.to(B).expand(40, -1))


def test_opcheck(device):
    torch.library.opcheck(_op, (matrix(device, dtype=B),))
    torch.library.opcheck(_op, (matrix(device, dtype=B).requires_grad_(),))


def test_compiles_to_one_graph_over_changing_numbers_of_rows(monkeypatch):
    monkeypatch.setenv("IJEPA_KERNELS", "torch")
    inputs = [[matrix("cpu", rows=rows).requires_grad_()] for rows in (7, 11, 5)]
    assert_compiles_once(lambda x: column_sum(x * 2), inputs)


@pytest.mark.parametrize("x", [torch.zeros(8), torch.zeros(3, 8, dtype=torch.int64), [[1.0]]])
def test_bad_input(x):
    with pytest.raises(ValueError, match=r"x: want a .* \[T, D\] tensor, got "):
        column_sum(x)


def test_the_reference_is_what_a_cpu_computes():
    x = matrix("cpu", rows=300, dtype=B)
    assert torch.equal(column_sum(x), column_sum_ref(x))
    assert torch.equal(column_sum(x), x.sum(0, dtype=F))


@pytest.mark.gpu
def test_no_wait_for_the_device():
    x = matrix("cuda", dtype=B)
    column_sum(x)
    with forbidden_sync():
        column_sum(x)
