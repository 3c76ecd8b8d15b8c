"""A web server on this machine: what the tests' cameras, hubs and webhooks answer with."""

import http.server
import threading


class Answer(http.server.BaseHTTPRequestHandler):
    """Says nothing of its requests."""

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer; in the names of headers _ stands for -."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """Answers from its making to the end of its `with` block."""

    daemon_threads = True

    def __init__(self, answer: type[Answer], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), answer)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
