"""Makes training_worker importable, for the tests and for the processes that they start."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# Python's fork server does not take over sys.path, but its environment.
_found = os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), str(HERE.parents[1]), *([_found] if _found else [])]
)
