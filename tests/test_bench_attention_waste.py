"""bench/attention_waste.py against counts by hand."""
from pathlib import Path

import pytest

from bench import attention_waste
from bench.attention_waste import LAYOUTS, SHIPPED, Layout, alone, draw, flattened, markdown, packed, ratio

TABLE = Path(__file__).parents[1] / "docs/attention_waste.md"


def test_sequences_with_tiles_of_their_own():
    assert alone([[65, 64], [1]], 64, 32) == 128 * 96 + 64 * 64 + 64 * 32


def test_whole_sequences_of_an_image_share_a_tile():
    # 200 is longer than a tile; 70 and 50 share one, with 60 there would be 130; another image shares nothing.
    assert packed([[50, 70, 60, 200], [8]], 128, 64) == 256 * 256 + 128 * 128 + 128 * 64 + 128 * 64


def test_a_flat_tile_walks_over_all_sequences_that_it_touches():
    # Tokens 0 to 3 lie in the first two sequences, 4 to 7 in the second alone, 5 long; 8 to 11 in the third.
    assert flattened([[3, 5], [4]], 4, 2) == 4 * 8 + 4 * 6 + 4 * 4
    assert flattened([[3, 2]], 4, 1) == 4 * 5 + 4 * 2  # the last tile is not full


def test_ratio_counts_two_products_forward_and_those_of_the_backward():
    layout = Layout("", alone, (64, 64), (64, 32), products=7)
    assert ratio(layout, [[64], [64]], training=True) == pytest.approx(9 / 7)
    assert ratio(layout._replace(products=5), [[64]], training=True) == 1
    assert ratio(layout, [[64]], training=False) == 1
    assert ratio(layout, [[33]], training=True) == pytest.approx((2 + 7) * 64 * 64 / (7 * 33 * 33))
    assert ratio(layout, [[32]], training=True) == pytest.approx((2 * 64 * 64 + 7 * 64 * 32) / (7 * 32 * 32))


def test_lengths_are_the_sampler_s(monkeypatch):
    monkeypatch.setattr(attention_waste, "STEPS", 2)
    parts = draw("configs/vitb16_in1k.yaml", "truncate")
    context, predictor = parts["context"], parts["predictor"]
    assert len(context) == len(predictor) == 2 * 128
    assert context[:128] == [context[0]] * 128  # one group
    assert context[0] != context[128]  # of another step
    assert all(len(lengths) == 4 and min(lengths) > n for lengths, (n,) in zip(predictor, context, strict=True))
    assert parts["dense target"] == [[196]] * 128
    ragged = draw("configs/vitb16_in1k.yaml", "ragged")["context"]
    assert all(whole >= cut for (whole,), (cut,) in zip(ragged, context, strict=True))
    assert len({n for (n,) in ragged[:128]}) > 1


@pytest.mark.parametrize("sequences", [1, 4])  # contexts, and a predictor's, which are as long as each other
def test_packing_does_not_lower_the_work_at_any_length_that_is_drawn(sequences):
    """Why it is not built: else attention_triton's docstring is wrong. The shortest context of our recipes has 35."""
    (packing,) = (layout for layout in LAYOUTS if layout.pairs is packed)
    for n in range(33, 281):
        assert ratio(packing, [[n] * sequences], training=True) >= ratio(SHIPPED, [[n] * sequences], training=True), n


def test_the_table_in_the_docs_is_what_the_command_writes():
    """Else: `python bench/attention_waste.py --markdown docs/attention_waste.md`."""
    assert TABLE.read_text() == markdown()
