"""A PostgreSQL server for the tests: Debian's programs, a data folder and a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def _programs() -> Path:
    """Return the folder in which Debian installs the programs of the newest server."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    assert found, "postgresql is not installed: make test-packages"
    return found[-1]


class Postgres:
    """A running server that can be stopped, restarted and closed; `url` contains a password."""

    password = "s3cret-word"

    def __init__(self) -> None:
        # PostgreSQL does not run as root.
        self.user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="nipq-postgres-"))
        if os.getuid() == 0:
            shutil.chown(self.folder, self.user)
        (self.folder / "password").write_text(self.password)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        data, password = str(self.folder / "data"), f"--pwfile={self.folder / 'password'}"
        self._run(
            "initdb",
            "-D",
            data,
            "-U",
            "nipq",
            "-A",
            "scram-sha-256",
            password,
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _options(self) -> dict[str, object]:
        own = {"user": self.user, "extra_groups": []} if os.getuid() == 0 else {}
        return {
            "cwd": self.folder,
            "stdout": subprocess.DEVNULL,
            "env": {"PATH": "/usr/bin"},
        } | own

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(_programs() / program), *arguments]
        subprocess.run(command, check=True, **self._options())

    def start(self) -> None:
        """Start the server and wait until it responds."""
        command = [str(_programs() / "postgres"), "-D", str(self.folder / "data")]
        command += ["-p", str(self.port), "-k", str(self.folder), "-F"]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=50"]
        log = (self.folder / "log.txt").open("ab")
        self.process = subprocess.Popen(command, stderr=log, **self._options())
        log.close()
        limit = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()
            assert time.monotonic() < limit, "PostgreSQL does not respond"
            time.sleep(0.05)

    def answers(self) -> bool:
        """Return whether the server accepts connections."""
        command = [str(_programs() / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        return subprocess.run(command).returncode == 0

    @property
    def url(self) -> str:
        """Return the URL of the server's default database."""
        return f"postgresql://nipq:{self.password}@127.0.0.1:{self.port}/postgres"

    def new_database(self, name: str) -> str:
        """Create a database and return its URL."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url.removesuffix("postgres") + name

    def stop(self) -> None:
        """Kill the server, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._wait_for_children()

    def _wait_for_children(self) -> None:
        """Wait until the child processes have exited, and remove the data folder's lock."""
        lock = self.folder / "data" / "postmaster.pid"
        time.sleep(0.5)
        lock.unlink(missing_ok=True)

    def close(self) -> None:
        """Shut the server down so that it frees its shared memory, and remove its folder."""
        assert self.process is not None
        if self.process.poll() is not None:  # restarting recovers from a crash
            self.start()
        self.process.send_signal(signal.SIGQUIT)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
