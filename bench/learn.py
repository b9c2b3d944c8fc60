"""The command `python bench/learn.py`, which asks what a recipe learns in a given time: bench/learning/learn.py."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.learning.learn import main

if __name__ == "__main__":
    sys.exit(main())
