"""OpenCV's blobFromImages, with one scale for all channels and a division afterwards, or with one for each; no other operation."""

import cv2
import numpy as np

from . import IMAGE_MEAN, IMAGE_STD, pixels


def versions():
    return cv2.__version__


def prepare_images(cell):
    cv2.setNumThreads(cell.threads)
    images = list(pixels(cell))
    mean, scale = 255 * IMAGE_MEAN, 1 / (255 * IMAGE_STD)
    params = cv2.dnn.Image2BlobParams()
    params.mean, params.scalefactor = tuple(map(float, mean)), tuple(map(float, scale))
    if cell.layout == "last":
        params.datalayout = getattr(cv2, "DNN_LAYOUT_NHWC", None) or cv2.dnn.DNN_LAYOUT_NHWC  # until OpenCV 5
    calls = [lambda: cv2.dnn.blobFromImagesWithParams(images, params)]
    if cell.layout == "first":
        std = IMAGE_STD.reshape(3, 1, 1)

        def divided():
            y = cv2.dnn.blobFromImages(images, 1 / 255, mean=tuple(map(float, mean)))
            return np.divide(y, std, out=y)

        calls.append(divided)
    return calls, lambda y: {"y": y}
