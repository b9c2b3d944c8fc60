"""From features back to pixels: sketches of what the predictor believes. The command is `python -m ijepa_fast.decode`.

The I-JEPA paper (arXiv 2301.08243) decodes its predictor's outputs with RCDM (arXiv 2112.09164).
Here a small flow-matching model does the same, trained on the predictions for hidden blocks and the pixels that were
there: where its samples agree the prediction knows, where they differ it leaves open.
"""
