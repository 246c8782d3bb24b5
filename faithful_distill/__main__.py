"""`python -m faithful_distill`: the same as `faithful-distill`."""
from faithful_distill.cli import main

main(prog_name="faithful-distill")
