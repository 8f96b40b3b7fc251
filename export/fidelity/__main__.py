"""`python -m export.fidelity` is `videolavit fidelity`."""

import sys

from export.fidelity.command import fidelity
from runtime.errors import VideoLavitError

try:
    fidelity()
except VideoLavitError as problem:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(problem.exit_code)
