"""`python -m faithful_distill`: the same as `faithful-distill`."""
from faithful_distill.cli import main

if __name__ == "__main__":
    main(prog_name="faithful-distill")
