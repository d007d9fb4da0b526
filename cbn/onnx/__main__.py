"""python -m cbn.onnx fold IN OUT: folds the batch normalizations of a model in a file."""

import argparse
import os
import sys

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import uses_external_data

from .fold import fold


def save(model, path, external):
    """Write a model, with its tensors in a file of their own beside it where asked, or where one message has no room for them."""
    if not external:
        try:
            return onnx.save(model, path)
        except (EncodeError, ValueError):
            pass
    data = f"{path}.data"
    if os.path.exists(data):
        os.remove(data)         # onnx would append to it
    return onnx.save(model, path, save_as_external_data=True, location=os.path.basename(data))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m cbn.onnx", description="Batch normalization in ONNX models.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fold", help="fold batch normalizations into the layers beside them")
    command.add_argument("IN", help="the model; files of external data are read, too")
    command.add_argument("OUT", help="the folded model; its weights go to OUT.data, where IN has such a file or they are more than 2 GB")
    command.add_argument("--no-compare", action="store_true", help="don't run both models on drawn inputs")
    options = parser.parse_args(arguments)
    if os.path.exists(options.OUT) and os.path.exists(options.IN) and os.path.samefile(options.IN, options.OUT):
        parser.error("OUT: expected another file than IN")
    try:
        external = any(map(uses_external_data, onnx.load(options.IN, load_external_data=False).graph.initializer))
        model, report = fold(options.IN, compare=not options.no_compare)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:       # no file, no model, or one whose external data are missing
        sys.exit(f"IN: {options.IN} can't be read: {error}")
    try:
        save(model, options.OUT, external)
    except OSError as error:
        sys.exit(f"OUT: {options.OUT} can't be written: {error}")
    print(report)
    try:
        onnx.checker.check_model(options.OUT)
    except onnx.checker.ValidationError as error:
        sys.exit(f"onnx.checker finds fault with {options.OUT}, as it may with {options.IN}: {error}")


if __name__ == "__main__":
    main()
