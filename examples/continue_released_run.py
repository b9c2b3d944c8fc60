"""Go on with a released I-JEPA run, from its own epoch: weights, optimizer state, schedules and momentum in place.

    python examples/continue_released_run.py IN1K-vit.h.14-300e.pth.tar in1k_vith14_ep300.yaml /data/imagenet/train RUN

In this order: a released .pth.tar; the YAML it was trained with (a released one as it is, or ours); the images; the
folder of the run that goes on. Further words replace keys of the config: `optim.epochs=310 parallel.strategy=fsdp`.
"""
import argparse
import sys

from ijepa_fast.convert import main as convert
from ijepa_fast.train import main as train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("config")
parser.add_argument("images", help="a folder of images, one sub-folder a class")
parser.add_argument("run")
parser.add_argument("overrides", nargs="*", metavar="section.key=value")
args = parser.parse_args()

# The same as on the command line:
#   python -m ijepa_fast.convert CHECKPOINT RUN --to run --config CONFIG data.root=IMAGES
#   python -m ijepa_fast.train --config RUN/config.yaml --resume
failed = convert(
    [args.checkpoint, args.run, "--to", "run", "--config", args.config, f"data.root={args.images}", *args.overrides]
) or train(["--config", f"{args.run}/config.yaml", "--resume"])
sys.exit(failed)
