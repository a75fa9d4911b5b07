"""The command: `python -m specscale plain IN OUT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from specscale.errors import Refusal
from specscale.files import ENDINGS, make_file_plain

PLAIN = """
Write a checkpoint file again so that it loads without specscale. Every scaled state dict in it, wherever it is nested
(state_dict, state_dict_ema, model), gets the names and the order of the plain model. An optimizer's state is put into
the plain order where its groups carry param_names, as from Adam(model.named_parameters()); without them it cannot be
known whose state is whose, and it is dropped. All else stays as it is. What was done is printed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m specscale", description="Commands for files of scaled models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    plain = commands.add_parser("plain", help="make the state dicts in a checkpoint file plain", description=PLAIN)
    plain.add_argument("source", metavar="IN", type=Path, help=f"a file whose name ends in {', '.join(ENDINGS)}")
    plain.add_argument("target", metavar="OUT", type=Path, help="of the same format; may be IN")
    plain.add_argument(
        "--trust-pickle",
        action="store_true",
        help="load objects other than tensors and plain data too, which runs whatever code the file asks for",
    )
    given = parser.parse_args(arguments)
    try:
        report = make_file_plain(given.source, given.target, trust_pickle=given.trust_pickle)
    except Refusal as error:
        print(f"{plain.prog}: error: {error}", file=sys.stderr)
        return 1
    print("\n".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
