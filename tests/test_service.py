"""The service of examples/service: what it answers, what its load test notices, and a short form of stress/servers.py, with real servers."""

import io
import os
import pathlib
import re
import subprocess
import sys
import threading
import wsgiref.simple_server
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

for package in ("flask", "a2wsgi", "PIL", "threadpoolctl"):
    pytest.importorskip(package)

from PIL import Image

import cbn

FOLDER = pathlib.Path(__file__).parent
EXAMPLES = FOLDER.parent / "examples"


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from service import app, load, model

        yield SimpleNamespace(app=app, load=load, model=model)


@pytest.fixture
def post(service):
    client = service.app.app.test_client()

    def call(body):
        response = client.post("/predict", data=body)
        return response.status_code, response.get_json()

    return call


def file(image, format="PNG"):
    written = io.BytesIO()
    image.save(written, format)
    return written.getvalue()


def test_answers_are_those_of_the_labels(service, post):
    files, labels = service.model.test_set()
    answers = [post(body) for body in files]
    assert {status for status, _ in answers} == {200}
    assert np.mean([answer["digit"] == label for (_, answer), label in zip(answers, labels, strict=True)]) > 0.98
    assert all(0.1 <= answer["probability"] <= 1 for _, answer in answers)


@pytest.mark.parametrize("format, mode", [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("GIF", "P"), ("BMP", "L"), ("TIFF", "L"), ("PPM", "L")])
def test_formats(service, post, format, mode):
    """The same pixels in another format and larger are the same answer."""
    body = service.model.test_set()[0][0]
    image = Image.open(io.BytesIO(body)).resize((320, 320), Image.Resampling.NEAREST)
    assert post(file(image.convert(mode), format)) == post(body)


WRONG = {
    "nothing": (b"", "got nothing"),
    "not an image": (b"seven", "expected an image file .* got 5 bytes"),
    "broken": (file(Image.new("L", (64, 64)))[:50], "expected an image file .* got 50 bytes"),
    "too many bytes": (bytes((1 << 20) + 1), "at most 1048576 bytes"),
    "too many pixels": (file(Image.new("1", (3000, 3000))), "at most 4000000 pixels"),
    "far too many pixels": (b"P4 20000 20000\n", "at most 4000000 pixels"),
    "16 bits": (file(Image.fromarray(np.ones((8, 8), np.uint16))), "8 bits a channel"),
    "a format that starts other programs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "expected an image file"),
}


@pytest.mark.parametrize("body, message", WRONG.values(), ids=WRONG)
def test_bad_requests(post, body, message):
    status, answer = post(body)
    assert status == 400 and list(answer) == ["error"]
    assert re.search(message, answer["error"])


def test_other_requests(service):
    client = service.app.app.test_client()
    response = client.post("/predict", data={"image": (io.BytesIO(service.model.test_set()[0][0]), "digit.png")})
    assert response.status_code == 400 and response.get_json()["error"].endswith("got a form")
    assert client.get("/health").get_json() == {"status": "ok", "cbn": cbn.__version__, "threads": cbn.get_num_threads()}
    for path, status in (("/predict", 405), ("/elsewhere", 404)):
        response = client.get(path)
        assert response.status_code == status and list(response.get_json()) == ["error"]


def test_many_threads(service):
    """Share the network: each gets the answers that one alone gets."""
    model = service.model
    xs = [model.pixels(body)[np.newaxis] for body in model.test_set()[0][:100]]
    expected = [service.app.network(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for actual, right in zip(pool.map(service.app.network, xs * 5), expected * 5, strict=True):
            np.testing.assert_array_equal(actual, right)


def test_wrong_weights(service, tmp_path):
    model, path = service.model, tmp_path / "weights.npz"
    with pytest.raises(FileNotFoundError, match="weights.npz: expected the weights, found no such file; `python -m service.train` makes it"):
        model.load(path)
    for content in (b"", b"not weights", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="weights.npz: expected the weights, an .npz file of plain arrays, got another file"):
            model.load(path)
    np.savez(path, a=np.array([{}]))
    with pytest.raises(ValueError, match="weights.npz: expected the weights, an .npz file of plain arrays"):
        model.load(path)
    state = service.app.network.state_dict()
    mismatch = r"size mismatch for 2.weight: expected shape \(16,\), got \(3,\)"
    for change, told in (({"2.weight": np.ones(3)}, mismatch), ({"9.bias": np.ones(3)}, r'Unexpected key\(s\) in state_dict: "9.bias"')):
        np.savez(path, **state | change)
        with pytest.raises(ValueError, match=rf"weights.npz: Error\(s\) in loading state_dict for 5 layers:\n\t{told}"):
            model.load(path)


@contextmanager
def answering(status, body):
    """The URL of a server that is healthy and gives this answer to every image."""

    def app(environ, start_response):
        healthy = environ["PATH_INFO"] == "/health"
        start_response("200 OK" if healthy else status, [])
        return [b'{"cbn": ""}' if healthy else body]

    class Silent(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *args):
            pass

    with wsgiref.simple_server.make_server("127.0.0.1", 0, app, handler_class=Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status, body", [("200 OK", b'{"digit": 3, "probability": 0.5}'), ("200 OK", b"[]"), ("200 OK", b"<html>"),
                                          ("500 Internal Server Error", b'{"error": "?"}')])
def test_load_notices_wrong_answers(service, capsys, status, body):
    with answering(status, body) as url:
        assert not service.load.report(url, 6, 2)
    assert "6 requests over 2 connections: 0 lost, 6 wrong" in capsys.readouterr().out


def python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(cbn.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_load_says_what_is_amiss(service):
    url = "http://127.0.0.1:1"
    with answering("200 OK", b"") as busy:
        for arguments, told in (
            (["--url", url], f"no answer from {url} .*; start the service in another terminal: gunicorn"),
            (["--url", url, "--serve", "no-such-program"], "the server cannot be started .*: no-such-program"),
            (["--url", url, "--serve", f"'{sys.executable}' -c 'raise OSError(7)'"], "the server ended with status 1 before it answered: .*OSError: 7"),
            (["--url", busy, "--serve", "no-such-program"], f"a server runs at {busy} already"),
        ):
            done = python("-m", "service.load", "--requests", "5", *arguments)
            assert done.returncode == 1 and done.stderr.startswith("python -m service.load: ")
            assert re.search(told, done.stderr, re.DOTALL), done.stderr
    assert python("-m", "service.load", "--url", "nowhere").returncode == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="gunicorn forks")
def test_servers():
    for package in ("gunicorn", "uvicorn"):
        pytest.importorskip(package)
    done = python(FOLDER / "stress" / "servers.py", "--requests", "50")
    assert done.returncode == 0 and done.stdout.count(": right; 50 requests over 8 connections: 0 lost, 0 wrong;") == 6, done.stdout + done.stderr
