"""The service of examples/service under gunicorn --preload, with sync and with threaded workers, and under uvicorn: is any answer lost or wrong?

    python tests/stress/servers.py                     (a thousand requests each, a minute)
    python tests/stress/servers.py --requests 50

Each server runs twice: as users run it, where one image is work for one thread, and with every call of cbn shared among two threads, in the
parent before the fork and in the workers after it. Ends with status 1 where an answer was lost or wrong, or a server did not end well.
"""

import argparse
import math
import os
import pathlib
import socket
import subprocess
import sys

import cbn

FOLDER = pathlib.Path(__file__).parent
EXAMPLES = FOLDER.parents[1] / "examples"
SERVERS = (  # name, arguments of its app and of one made by a function, both on the port
    ("gunicorn", "--preload --workers 4 --bind 127.0.0.1:{port} {app}", "service.app:app", "servers:app()"),
    ("gunicorn", "--preload --worker-class gthread --workers 2 --threads 4 --bind 127.0.0.1:{port} {app}", "service.app:app", "servers:app()"),
    ("uvicorn", "--no-access-log --port {port} {app}", "service.app:asgi", "--factory servers:asgi"),
)


def in_teams():
    """The module of the service, where even the smallest calls use two threads."""
    cbn.set_num_threads(2)
    cbn.threads.set_grain(1)
    cbn.threads.set_patience(math.inf)
    from service import app

    return app


def app():
    return in_teams().app


def asgi():
    return in_teams().asgi


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="to each server (default %(default)s)")
    parser.add_argument("--connections", type=int, default=8, metavar="N", help="at once (default %(default)s)")
    given = parser.parse_args()
    path = os.pathsep.join(map(str, (FOLDER, pathlib.Path(cbn.__file__).parents[1])))
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONPATH": path}
    failed = 0
    for name, arguments, *apps in SERVERS:
        for app, how in zip(apps, ("one thread a call", "two threads a call"), strict=True):
            port = free_port()
            command = [sys.executable, "-m", "service.load", "--url", f"http://127.0.0.1:{port}", "--serve",
                       f"'{sys.executable}' -m {name} {arguments.format(port=port, app=app)}",
                       "--requests", str(given.requests), "--connections", str(given.connections)]
            done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False)
            failed += done.returncode != 0
            print(f"{name} {arguments.split(' --bind')[0].split(' --port')[0]}, {how}: {'right' if done.returncode == 0 else 'WRONG'}; "
                  f"{(done.stdout + done.stderr).strip()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
