# SPDX-License-Identifier: Apache-2.0
"""`python -m fullbeam`: the same as the `fullbeam` command."""

from fullbeam.cli import main

if __name__ == "__main__":
    main(prog_name="python -m fullbeam")
