"""Known vulnerabilities of the installed packages, by pip-audit. Run by `make slow`.

Exits with pip-audit's code; with 77 where its service could not be reached, so that nothing was checked."""

import subprocess
import sys

done = subprocess.run(
    [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off"],
    capture_output=True,
    text=True,
)
words = ("Connection", "Max retries", "ServiceError")
unreachable = [line for line in done.stderr.splitlines() if any(w in line for w in words)]
if done.returncode and not done.stdout.strip() and unreachable:
    print(f"pip-audit: its service cannot be reached, nothing was checked ({unreachable[-1].strip()[:120]})")
    sys.exit(77)
print(done.stdout + done.stderr)
sys.exit(done.returncode)
