"""The command `python bench/report.py`, which makes RESULTS.md of the records: bench/report/report.py."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report.report import main

if __name__ == "__main__":
    sys.exit(main())
