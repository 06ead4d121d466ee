"""How much memory a program needs beyond its imports, measured in a fresh process."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The kernel's own mark of this program. A child's ru_maxrss begins at that of the process that started it.
PEAK = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024"


def extra_bytes(imports: str, module: str, arguments: Sequence[str]) -> int:
    """Peak of `module.main(arguments)` above the peak after `imports`; it may not bring torch."""
    text = (
        f"import sys, {imports}\nfrom tools import {module}\nbefore = {PEAK}\n"
        f"{module}.main({list(arguments)!r})\nassert 'torch' not in sys.modules\nprint({PEAK} - before)"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
