"""An HTTP proxy on loopback, between s3fs and moto's server, that makes chosen requests fail as networks do."""

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_SECONDS = 1.5  # longer than the read timeout that the tests set
HOP = {"connection", "transfer-encoding", "keep-alive", "expect"}
ERROR = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>%s</Code><Message>made by the test</Message>"
    b"<RequestId>1</RequestId></Error>"
)


class FaultyServer:
    """
    Forwards to the port `upstream`, except for requests for which `fault(method, path)` returns one of:

    "500", "503", "denied" (403): this response, and nothing is forwarded. "cut upload": half of the body is read, then the
    connection is reset. "lost": forwarded, and reset instead of a response. "cut": half of the response's body is sent.
    "slow": the response is late.
    """

    def __init__(self, upstream: int):
        self.fault = lambda method, path: None
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the response's body
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30
            disable_nagle_algorithm = True  # otherwise each body waits 40 ms for the acknowledgement of its head

            def log_message(self, *args):
                pass

            def reset(self):
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

            def handle_any(self):
                length = int(self.headers.get("Content-Length", 0))
                kind = outer.fault(self.command, self.path)
                if kind == "cut upload":
                    self.rfile.read(length // 2)
                    outer.requests.append((self.command, self.path, 0))
                    return self.reset()
                body = self.rfile.read(length)
                if kind in ("500", "503", "denied"):
                    code = {"500": b"InternalError", "503": b"ServiceUnavailable", "denied": b"AccessDenied"}[kind]
                    status, headers, answer = 403 if kind == "denied" else int(kind), [], ERROR % code
                else:
                    connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=30)
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    status, headers, answer = (
                        response.status,
                        list(dict(response.getheaders()).items()),
                        response.read(),
                    )
                    connection.close()
                outer.requests.append((self.command, self.path, len(answer)))
                if kind == "lost":
                    return self.reset()
                if kind == "slow":
                    time.sleep(SLOW_SECONDS)
                self.send_response_only(status)
                declared = str(len(answer))
                for key, value in headers:
                    if key.lower() == "content-length" and self.command == "HEAD":
                        declared = value
                    elif key.lower() not in HOP | {"content-length"}:
                        self.send_header(key, value)
                self.send_header("Content-Length", declared)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer[: len(answer) // 2] if kind == "cut" else answer)
                if kind == "cut":
                    self.wfile.flush()
                    self.reset()
                return None

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            handle_error = lambda *args: None  # noqa: E731  clients give up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def count(self) -> Counter:
        """The number of requests since the last call, by method."""
        counted = Counter(method for method, _, _ in self.requests)
        self.requests.clear()
        return counted

    def close(self) -> None:
        """Stop: further connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def every(n: int, kinds: list[str]):
    """A fault function that fails every `n`-th request, with each kind in turn."""
    lock, seen = threading.Lock(), [0]

    def fault(method: str, path: str):
        with lock:
            seen[0] += 1
            number = seen[0]
        return kinds[number // n % len(kinds)] if number % n == 0 else None

    return fault
