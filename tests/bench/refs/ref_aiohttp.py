"""Reference point: the smallest reasonable reverse proxy on aiohttp."""

import os
import ssl

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

UPSTREAM = os.environ["UPSTREAM"]
KEY = "Bearer sk-bench"
NOT_PASSED_ON = {
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "host",
    "keep-alive",
    "transfer-encoding",
}
SESSION = web.AppKey("session", ClientSession)


def passed_on(headers):
    return {name: value for name, value in headers.items() if name.lower() not in NOT_PASSED_ON}


async def relay(request):
    if request.headers.get("authorization") != KEY:
        return web.json_response({"error": "unauthorized"}, status=401)
    url, headers = UPSTREAM + request.path_qs, passed_on(request.headers) | {"x-api-key": "up"}
    body = await request.read()
    async with request.app[SESSION].request(request.method, url, headers=headers, data=body) as answer:
        headers = passed_on(answer.headers)
        if "text/event-stream" not in answer.headers.get("content-type", ""):
            return web.Response(status=answer.status, headers=headers, body=await answer.read())
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        async for data in answer.content.iter_any():
            await response.write(data)
        await response.write_eof()
        return response


async def session(app):
    tls = ssl.create_default_context(cafile=os.environ["CA"])
    connector = TCPConnector(limit=0, ssl=tls)
    timeout = ClientTimeout(total=None)
    async with ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app[SESSION]:
        yield


if __name__ == "__main__":
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", relay)
    app.cleanup_ctx.append(session)
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), access_log=None, print=None)
