"""Known vulnerabilities of the installed packages, by pip-audit; passed over with a line where its service cannot be reached.

Run by `make slow`."""

import subprocess
import sys

done = subprocess.run(
    [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off"],
    capture_output=True,
    text=True,
)
unreachable = [
    line
    for line in done.stderr.splitlines()
    if "Connection" in line or "Max retries" in line or "ServiceError" in line
]
if unreachable:
    print(f"pip-audit: its service cannot be reached, nothing was checked ({unreachable[-1].strip()[:120]})")
else:
    print(done.stdout + done.stderr)
    sys.exit(done.returncode)
