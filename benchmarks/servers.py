"""The yardstick: what one would write by hand with FastAPI alone, and what both servers of the benchmark share."""

import asyncio
import gc
import json
import time
from typing import Any

from fastapi import APIRouter, FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel

measuring = APIRouter()


class Usage(BaseModel):
    """What the server process has used up to now: CPU in seconds (user and system), and its live asyncio tasks."""

    cpu: float
    tasks: int


@measuring.get("/usage")
async def usage(*, collect: bool = False) -> Usage:
    """Tell the usage of this process; `collect` empties the garbage first, so that memory may be read afterwards."""
    if collect:
        gc.collect()
    return Usage(cpu=time.process_time(), tasks=len(asyncio.all_tasks()))


def message(number: int, size: int) -> dict[str, Any]:
    """Make a numbered, time-stamped message that is `size` bytes long as compact JSON."""
    content = {"type": "bench.message", "n": number, "sent": time.monotonic_ns(), "text": ""}
    content["text"] = "x" * (size - len(compact(content)))
    return content


def compact(content: dict[str, Any]) -> str:
    """Encode as `WebSocket.send_json` and the consumers do, without blanks."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


app = FastAPI()
app.include_router(measuring)
members: set[WebSocket] = set()


@app.websocket("/ws/member")
async def member(websocket: WebSocket) -> None:
    """Stay among the members until the client goes."""
    await websocket.accept()
    members.add(websocket)
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        pass
    finally:
        members.discard(websocket)


@app.post("/publish")
async def publish(first: int, count: int, size: int, pause: float) -> None:
    """Send `count` messages to every member, sleeping `pause` seconds after each."""
    for number in range(first, first + count):
        text = compact(message(number, size))
        for websocket in list(members):
            await websocket.send_text(text)
        await asyncio.sleep(pause)


@app.websocket("/ws/echo")
async def echo(websocket: WebSocket) -> None:
    """Answer each frame in the shape of an action's reply."""
    await websocket.accept()
    try:
        while True:
            frame = await websocket.receive_json()
            reply = {
                "type": "response",
                "action": frame["action"],
                "request_id": frame["request_id"],
                "status": "ok",
                "data": frame["data"],
                "errors": None,
            }
            await websocket.send_json(reply)
    except WebSocketDisconnect:
        pass
