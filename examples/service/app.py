"""The service: POST an image of a digit to /predict, and get the digit; `app` is for WSGI servers (gunicorn), `asgi` for ASGI ones (uvicorn)."""

import numpy as np
from a2wsgi import WSGIMiddleware
from flask import Flask, abort, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import cbn

from .model import load, pixels, predict

LIMIT = 1 << 20  # bytes of a request

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = LIMIT
asgi = WSGIMiddleware(app)  # answers in a pool of threads

network = load()
predict(network, np.zeros((512, 8, 8), np.float32))  # what a first call does, done before gunicorn --preload forks its workers


@app.post("/predict")
def answer():
    if request.mimetype == "multipart/form-data":
        abort(400, "expected an image file as the body of the request (curl --data-binary @digit.png), got a form")
    try:
        x = pixels(request.get_data())
    except ValueError as error:
        abort(400, str(error))
    digit, probability = predict(network, x[np.newaxis])
    return jsonify(digit=int(digit[0]), probability=float(probability[0]))


@app.get("/health")
def health():
    return jsonify(status="ok", cbn=cbn.__version__, threads=cbn.get_num_threads())


@app.errorhandler(HTTPException)
def explain(error):
    if isinstance(error, RequestEntityTooLarge):
        return jsonify(error=f"expected an image file of at most {LIMIT} bytes, got more"), 400
    return jsonify(error=error.description), error.code
