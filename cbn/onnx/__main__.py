"""python -m cbn.onnx fold IN OUT: folds the batch normalizations of a model in a file."""

import argparse
import os
import sys

import onnx

from .fold import fold

LARGEST = 2**31 - 1     # bytes of a protobuf message


def save(model, path, external):
    """Write a model, with its tensors in a file of their own beside it where asked or where one message has no room for them."""
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    if external or size > LARGEST // 2:
        data = os.path.basename(path) + ".data"
        if os.path.exists(beside := os.path.join(os.path.dirname(path), data)):
            os.remove(beside)       # onnx would append to it
        onnx.save(model, path, save_as_external_data=True, location=data)
    else:
        onnx.save(model, path)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m cbn.onnx", description="Batch normalization in ONNX models.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "fold", help="fold batch normalizations into the layers beside them")
    command.add_argument("IN", help="the model; files of external data are read, too")
    command.add_argument("OUT", help="where the folded model goes; with external data, where IN has them or it is large, in OUT.data")
    command.add_argument("--no-compare", action="store_true", help="don't run both models on drawn inputs")
    options = parser.parse_args(arguments)
    if os.path.exists(options.OUT) and os.path.samefile(options.IN, options.OUT):
        parser.error("OUT: expected another file than IN")
    try:
        tensors = onnx.load(options.IN, load_external_data=False).graph.initializer
        external = any(map(onnx.external_data_helper.uses_external_data, tensors))
        model, report = fold(options.IN, compare=not options.no_compare)
    except Exception as error:      # no such file, not a model, external data that are missing
        sys.exit(f"IN: {options.IN} can't be read: {error or type(error).__name__}")
    save(model, options.OUT, external)
    print(report)
    try:
        onnx.checker.check_model(options.OUT)
    except onnx.checker.ValidationError as error:
        sys.exit(f"onnx.checker finds fault with {options.OUT}, as it may with {options.IN}: {error}")


if __name__ == "__main__":
    main()
