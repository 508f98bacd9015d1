# SPDX-License-Identifier: Apache-2.0
"""`python -m fullbeam.server`: the same as `fullbeam serve`."""

from fullbeam.cli.serve import serve

if __name__ == "__main__":
    serve(prog_name="python -m fullbeam.server")
