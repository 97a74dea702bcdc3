"""Reference point: FastAPI and httpx, the usual design of a gateway in Python."""

import os
import ssl

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

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

app = FastAPI()
client = httpx.AsyncClient(
    timeout=httpx.Timeout(None),
    verify=ssl.create_default_context(cafile=os.environ["CA"]),
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=200),
)


def passed_on(headers):
    return {name: value for name, value in headers.items() if name not in NOT_PASSED_ON}


@app.api_route("/{path:path}", methods=["GET", "POST"])
async def relay(path: str, request: Request):
    if request.headers.get("authorization") != KEY:
        return JSONResponse({"error": "unauthorized"}, 401)
    url, headers = f"{UPSTREAM}/{path}", passed_on(request.headers) | {"x-api-key": "up"}
    call = client.build_request(request.method, url, headers=headers, content=await request.body())
    answer = await client.send(call, stream=True)
    headers = passed_on(answer.headers)
    if "text/event-stream" not in answer.headers.get("content-type", ""):
        return Response(await answer.aread(), answer.status_code, headers)
    return StreamingResponse(stream(answer), answer.status_code, headers)


async def stream(answer):
    try:
        async for data in answer.aiter_raw():
            yield data
    finally:
        await answer.aclose()


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        log_level="warning",
        access_log=False,
        loop="asyncio",
        http="h11",
    )
