"""A storage of our own for the benchmarks: nginx with TLS on loopback, optionally slow in the two ways networks are.

A cap for each connection is the kernel's pacing of TCP (SO_MAX_PACING_RATE, set on the listening socket that nginx
inherits): it holds from the first byte on, whatever is asked over the connection, and costs no copy. (nginx's own
`proxy_download_rate` and `limit_rate` give the first second's bytes of each connection away.) The delay to the first byte
of each answer is a sleep in nginx.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

_SO_MAX_PACING_RATE = 47
MEMORY = Path("/dev/shm")
"""What lies there costs no disk when it is served."""


def program(name: str) -> str | None:
    """Where a program is, also where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def version(*command: str) -> str:
    """The first line that it says of itself, wherever it says it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().partition("\n")[0]


def listening(rate: int) -> socket.socket:
    """A socket on a port that the system chose; what it accepts sends no faster than `rate`, 0 for any speed."""
    listener = socket.socket()
    listener.settimeout(0)  # nginx takes it for granted: a worker that waits in accept serves nobody else
    if rate:
        listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    return listener


class Origin:
    """Serves `content` at `url`; clients trust `ca`.

    `rate` is in bytes per second and connection, `delay` in seconds, `room` the bytes that will be served: they lie in
    memory when there is so much of it.
    """

    def __init__(self, *, rate: int = 0, delay: float = 0.0, room: int = 0) -> None:
        self._rate, self._delay = rate, delay
        found = program("nginx")
        if found is None:
            message = "nginx is not installed"
            raise RuntimeError(message)
        self._nginx = found
        self._home = Path(tempfile.mkdtemp(prefix="origin-"))
        self.content = self._home / "content"
        self.ca = self._home / "ca.pem"
        self._room = room
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self._make_content()
            self._make_certificates()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End nginx and remove everything."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.content, ignore_errors=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def _make_content(self) -> None:
        if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > self._room * 1.2:
            self.content = Path(tempfile.mkdtemp(prefix="origin-", dir=MEMORY))
        else:
            self.content.mkdir()

    def _make_certificates(self) -> None:
        """An authority, and a leaf for loopback that it signed."""
        home = self._home
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        self._openssl(
            "req", "-x509", *key, "-days", "2", "-subj", "/CN=benchmark authority",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", "ca.key", "-out", "ca.pem",
        )  # fmt: skip
        self._openssl("req", "-new", *key, "-subj", "/CN=localhost", "-keyout", "leaf.key", "-out", "leaf.csr")
        (home / "leaf.cnf").write_text(
            "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        self._openssl(
            "x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "leaf.cnf", "-out", "leaf.pem",
        )  # fmt: skip

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self._home, capture_output=True, text=True, check=False)
        if done.returncode:
            message = f"openssl {arguments[0]}: {done.stderr}"
            raise RuntimeError(message)

    def _start(self) -> None:
        with listening(self._rate) as listener:
            self.port = listener.getsockname()[1]
            (self._home / "nginx.conf").write_text(self._configuration())
            self._process = subprocess.Popen(
                [self._nginx, "-p", str(self._home), "-c", "nginx.conf", "-e", str(self._home / "error.log")],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                env={**os.environ, "NGINX": f"{listener.fileno()};"},  # how it takes over sockets in an upgrade
            )
        end = time.monotonic() + 20
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                message = f"nginx does not start:\n{(self._home / 'error.log').read_text()}"
                raise RuntimeError(message)
            time.sleep(0.05)

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.ca))
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout=5) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
            ):
                connection.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return connection.recv(5) == b"HTTP/"
        except OSError:
            return False

    def _configuration(self) -> str:
        temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        return "\n".join(
            [
                *self._modules(),
                *([f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(0).gr_name};"] if os.geteuid() == 0 else []),
                "daemon off; worker_processes 2; worker_rlimit_nofile 8192; pid nginx.pid;",
                "error_log error.log warn;",
                "events { worker_connections 4096; }",
                "http {",
                *(f"  {name}_temp_path {name};" for name in temporary),
                "  access_log off; sendfile on; tcp_nodelay on; default_type application/octet-stream;",
                "  keepalive_timeout 300s; keepalive_requests 1000000;",
                "  ssl_certificate leaf.pem; ssl_certificate_key leaf.key;",
                "  ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:all:8m;",
                "  server {",
                f"    listen 127.0.0.1:{self.port} ssl backlog=4096; root {self.content};",
                *([f"    access_by_lua_block {{ ngx.sleep({self._delay}) }}"] if self._delay else []),
                "  }",
                "}",
                "",
            ]
        )

    def _modules(self) -> list[str]:
        """What is built as modules of its own, where nginx says that they are."""
        said = subprocess.run([self._nginx, "-V"], capture_output=True, text=True, check=True).stderr
        place = re.search(r"--modules-path=(\S+)", said)
        wanted = ["ndk_http_module", "ngx_http_lua_module"] if self._delay else []
        files = [Path(place[1]) / f"{name}.so" for name in wanted] if place else []
        return [f"load_module {file};" for file in files if file.exists()]
