"""The commands: `python -m specscale plain IN OUT` and `python -m specscale inspect CHECKPOINT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from specscale import __version__
from specscale.errors import Refusal
from specscale.files import ENDINGS, make_file_plain

PLAIN = """
Write a checkpoint file again so that it loads without specscale. Every scaled state dict in it, wherever it is nested
(state_dict, state_dict_ema, model), gets the names and the order of the plain model. An optimizer's state is put into
the plain order where its groups carry param_names, as from Adam(model.named_parameters()); without them it cannot be
known whose state is whose, and it is dropped. All else stays as it is. What was done is printed.
"""

INSPECT = """
Print the spectral norm, the Frobenius norm and the stable rank of every weight, and the target of those that are
scaled: of every state dict in a checkpoint file, wherever it is nested, or of a model that timm builds, which is not
trained unless --pretrained downloads weights. A file has no layers, so that a weight is told by its name, as a tensor
of two axes or more that ends in weight or kernel, and read as one matrix, its first axis by the others: so are grouped
convolutions, a fused qkv and embeddings. A scaled weight is read as the matrices that are scaled. Of several matrices,
the largest norms are shown, and the smallest stable rank.
"""

TRUST = "load objects other than tensors and plain data too, which runs whatever code the file asks for"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m specscale", description="Commands for files of models.")
    parser.add_argument("--version", action="version", version=f"specscale {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    plain = commands.add_parser("plain", help="make the state dicts in a checkpoint file plain", description=PLAIN)
    plain.add_argument("source", metavar="IN", type=Path, help=f"a file whose name ends in {', '.join(ENDINGS)}")
    plain.add_argument("target", metavar="OUT", type=Path, help="of the same format; may be IN")
    plain.add_argument("--trust-pickle", action="store_true", help=TRUST)
    plain.set_defaults(run=_plain, prog=plain.prog)
    inspect = commands.add_parser("inspect", help="show the norms in a checkpoint file", description=INSPECT)
    inspect.add_argument(
        "source",
        metavar="CHECKPOINT | TIMM_NAME",
        help=f"a file whose name ends in {', '.join(ENDINGS)}; or as resnet50",
    )
    inspect.add_argument("--plot", metavar="PICTURE", type=Path, help="draw the norms too, into a file such as out.png")
    inspect.add_argument("--pretrained", action="store_true", help="with timm's weights, which are downloaded")
    inspect.add_argument("--trust-pickle", action="store_true", help=TRUST)
    inspect.set_defaults(run=_inspect, prog=inspect.prog)
    given = parser.parse_args(arguments)
    try:
        print(given.run(given))
    except Refusal as error:
        print(f"{given.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _plain(given: argparse.Namespace) -> str:
    return "\n".join(make_file_plain(given.source, given.target, trust_pickle=given.trust_pickle))


def _inspect(given: argparse.Namespace) -> str:
    # Only where it is asked for: what draws takes a while to import.
    from specscale.inspection import inspect
    from specscale.pictures import draw, require_matplotlib

    if given.plot is not None:
        require_matplotlib()
        if not given.plot.resolve().parent.is_dir():
            raise Refusal(f"there is no folder {str(given.plot.resolve().parent)!r}")
    found = inspect(given.source, pretrained=given.pretrained, trust_pickle=given.trust_pickle)
    if given.plot is not None:
        draw(found, given.plot)
    return "\n\n".join(map(str, found))


if __name__ == "__main__":
    sys.exit(main())
