"""The network of the service, with the weights that train.py wrote, and what makes its input of an image file."""

import io
import pathlib
from zipfile import BadZipFile

import numpy as np
from network import convolutional, softmax
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
WEIGHTS = FOLDER / "weights.npz"
TEST_SET = FOLDER / "digits.npz"
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # pictures; of what Pillow reads else, some starts other programs
LARGEST = 4_000_000  # pixels: a small file may hold a picture that is too large for the memory


def load(path=WEIGHTS):
    """The trained network in eval mode, which any number of threads may call."""
    try:
        with np.load(path, allow_pickle=False) as file:
            state = dict(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected the weights, found no such file; `python -m service.train` makes it") from None
    except (ValueError, TypeError, EOFError, BadZipFile):
        raise ValueError(f"{path}: expected the weights, an .npz file of plain arrays, got another file") from None
    network = convolutional(seed=0)
    try:
        network.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return network.eval()


def pixels(data):
    """The 8x8 pixels, in [0, 1], of an image file, given as bytes. Raises ValueError that says what is wrong with them."""
    if not data:
        raise ValueError("expected an image file, got nothing")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        mode = image.mode
        if image.width * image.height > LARGEST:
            raise Image.DecompressionBombError
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        image = image.convert("L").resize((8, 8), Image.Resampling.BOX)
    except Image.DecompressionBombError:  # this or Pillow's own, of far more pixels
        raise ValueError(f"expected an image of at most {LARGEST} pixels, got one of more") from None
    except Exception:  # noqa: BLE001  for broken files, decoders raise whatever they come across
        raise ValueError(f"expected an image file ({', '.join(FORMATS)}), got {len(data)} bytes that are none, or a broken one") from None
    if mode.startswith(("I", "F")):
        raise ValueError(f"expected an image of 8 bits a channel, got one of more (Pillow's mode {mode})")
    return np.asarray(image, np.float32) / 255


def predict(network, x):
    """The digits that images of shape (N, 8, 8) show, and their probabilities: two arrays of shape (N,)."""
    p = softmax(network(x))
    return p.argmax(axis=1), p.max(axis=1)


def test_set():
    """PNG files of the digits that the network was not trained on, as bytes, and their labels."""
    with np.load(TEST_SET, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    return [png(image) for image in images], labels


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
