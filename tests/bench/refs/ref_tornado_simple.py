"""Reference point: Tornado with its stock client, SimpleAsyncHTTPClient.

The client opens a connection per request, and its streaming_callback cannot slow the upstream down.
"""

import asyncio
import os
import ssl

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.web import Application, RequestHandler

UPSTREAM = os.environ["UPSTREAM"]
TLS = ssl.create_default_context(cafile=os.environ["CA"])
KEY = "Bearer sk-bench"
NOT_PASSED_ON = {
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "date",
    "host",
    "keep-alive",
    "server",
    "transfer-encoding",
}


def passed_on(headers):
    return {name: value for name, value in headers if name.lower() not in NOT_PASSED_ON}


class Relay(RequestHandler):
    async def post(self):
        if self.request.headers.get("authorization") != KEY:
            self.set_status(401)
            self.finish({"error": "unauthorized"})
            return
        call = HTTPRequest(
            UPSTREAM + self.request.uri,
            method="POST",
            headers=passed_on(self.request.headers.get_all()) | {"x-api-key": "up", "expect": ""},
            body=self.request.body,
            header_callback=self.on_header,
            streaming_callback=self.on_data,
            request_timeout=600,
            decompress_response=False,
            ssl_options=TLS,
        )
        await AsyncHTTPClient().fetch(call, raise_error=False)

    def on_header(self, line):
        """Take the status line, then one header a call."""
        if line.startswith("HTTP/"):
            self.set_status(int(line.split()[1]))
            return
        name, colon, value = line.partition(":")
        if colon and name.lower() not in NOT_PASSED_ON:
            self.set_header(name, value.strip())

    def on_data(self, data):
        self.write(data)
        self.flush()


async def main():
    AsyncHTTPClient.configure(None, max_clients=5000)
    app = Application([(".*", Relay)])
    app.listen(int(os.environ["PORT"]), "127.0.0.1", max_buffer_size=64 << 20)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
