"""The command `python bench/record.py`, which runs the suites and keeps what they measure: bench/report/record.py."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report.record import main

if __name__ == "__main__":
    sys.exit(main())
