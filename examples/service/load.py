"""Loads the service with requests from many connections at once, checks every answer, and tells how fast they came.

    python -m service.load                                                      (of a server that runs)
    python -m service.load --serve "gunicorn --preload -w 4 service.app:app"    (starts the server, and ends it)

Each request posts a digit of the test set. Its answer is right where digit and probability are those that the same network gives here.
Ends with status 1 where an answer was lost or wrong, or the server did not end by itself.
"""

import argparse
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from urllib.parse import urlsplit

import numpy as np

from .model import load, pixels, predict, test_set

PATIENCE = 30  # seconds for an answer, for a server to start, and for it to end


class Connection:
    """One connection to the server, kept alive as long as the server does."""

    def __init__(self, url):
        self.http = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)

    def ask(self, method, path, body=None):
        """Status and body of the answer. Raises OSError or HTTPException where none comes."""
        try:
            self.http.request(method, path, body)
            response = self.http.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            self.http.close()  # the next request opens it anew
            raise


def reason_not_to_answer(url):
    """Why the service is not to be had at a URL, or None where it is."""
    try:
        status, body = Connection(url).ask("GET", "/health")
    except (OSError, http.client.HTTPException) as error:
        return f"no answer from {url} ({error or type(error).__name__})"
    return None if status == 200 and b'"cbn"' in body else f"something else answers at {url} (GET /health gave status {status})"


@contextmanager
def served(command, url):
    """A server for as long as the block lasts; raises RuntimeError where it doesn't start, or doesn't end when told to."""
    with tempfile.TemporaryFile("w+") as log:

        def failure(what):
            log.seek(0)
            return RuntimeError(f"{what}: {command}\n{log.read()}".rstrip())

        try:
            server = subprocess.Popen(shlex.split(command), stdout=log, stderr=log, start_new_session=True)
        except OSError as error:
            raise RuntimeError(f"the server cannot be started ({error}): {command}") from None
        try:
            end = time.monotonic() + PATIENCE
            while reason := reason_not_to_answer(url):
                if server.poll() is not None:
                    raise failure(f"the server ended with status {server.returncode} before it answered")
                if time.monotonic() > end:
                    raise failure(f"{reason} for {PATIENCE} seconds after the server was started")
                time.sleep(0.05)
            yield
            server.terminate()
            try:
                status = server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise failure(f"the server still runs {PATIENCE} seconds after SIGTERM") from None
            if status not in (0, -signal.SIGTERM):
                raise failure(f"the server ended with status {status}")
        finally:
            try:
                os.killpg(server.pid, signal.SIGKILL)  # the server and its workers, where they still run
            except ProcessLookupError:
                pass
            server.wait()


def right(status, body, digit, probability):
    try:
        given = json.loads(body)
        return status == 200 and given["digit"] == digit and abs(given["probability"] - probability) < 1e-5
    except (ValueError, TypeError, KeyError):
        return False


def run(url, requests, connections, files, expected):
    """Post the files in turn; return each answered request's seconds, and a list of what went wrong."""

    def client(first):
        connection, seconds, faults = Connection(url), [], []
        for i in range(first, requests, connections):
            start = time.perf_counter()
            try:
                status, body = connection.ask("POST", "/predict", files[i % len(files)])
            except (OSError, http.client.HTTPException) as error:
                faults.append(f"request {i} was lost: {error or type(error).__name__}")
                continue
            seconds.append(time.perf_counter() - start)
            digit, probability = expected[i % len(files)]
            if not right(status, body, digit, probability):
                faults.append(f"request {i}: expected digit {digit}, probability {probability:.6f}, got status {status}, {body[:200]!r}")
        connection.http.close()
        return seconds, faults

    with ThreadPoolExecutor(connections) as pool:
        seconds, faults = zip(*pool.map(client, range(connections)), strict=True)
    return list(chain(*seconds)), list(chain(*faults))


def report(url, requests, connections):
    """Run, print the figures; return whether every answer came and was right."""
    files, _ = test_set()
    network = load()
    expected = [(int(digit[0]), float(p[0])) for digit, p in (predict(network, pixels(file)[np.newaxis]) for file in files)]
    start = time.perf_counter()
    seconds, faults = run(url, requests, connections, files, expected)
    whole = time.perf_counter() - start
    lost = requests - len(seconds)
    print(f"{requests} requests over {connections} connections: {lost} lost, {len(faults) - lost} wrong", end="")
    if seconds:
        p50, p99 = np.percentile(seconds, (50, 99)) * 1000
        print(f"; {len(seconds) / whole:.0f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(*faults[:5], sep="\n", end="\n" if faults else "")
    return not faults


def count(text):
    n = int(text)
    if n < 1:
        raise ValueError
    return n


def main():
    parser = argparse.ArgumentParser(prog="python -m service.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
    parser.add_argument("--requests", type=count, default=1000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--connections", type=count, default=8, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--serve", metavar="COMMAND", help="starts the server, which must listen at the URL")
    given = parser.parse_args()
    if urlsplit(given.url).scheme != "http" or not urlsplit(given.url).netloc:
        parser.error(f"--url: expected http://host:port, got {given.url}")
    reason = reason_not_to_answer(given.url)
    try:
        if given.serve:
            if reason is None or "something else" in reason:
                raise RuntimeError(f"a server runs at {given.url} already: end it, or choose another port for --url and the server")
            with served(given.serve, given.url):
                fine = report(given.url, given.requests, given.connections)
        elif reason:
            raise RuntimeError(f'{reason}; start the service in another terminal: gunicorn --preload -w 4 service.app:app')
        else:
            fine = report(given.url, given.requests, given.connections)
    except RuntimeError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
