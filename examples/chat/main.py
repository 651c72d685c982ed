"""The chat's application: a page, a WebSocket for each window, and announcements over HTTP."""

from datetime import datetime
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from examples.chat.consumers import Name, Text, group_of, now
from examples.chat.routing import router
from fastapi_channels import Layer, add_channel

PAGE = Path(__file__).with_name("index.html")

app = FastAPI(title="Chat")
add_channel(app, settings="examples.chat.settings")
app.include_router(router)


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page that a browser opens."""
    return FileResponse(PAGE)


@app.post("/rooms/{room}/announce", status_code=202)
async def announce(room: Name, announcement: Text, layer: Layer) -> dict[str, datetime]:
    """Tell everybody in a room something, from outside of it, by a plain HTTP request."""
    at = now()
    await layer.group_send(group_of(room), {"type": "chat.announcement", "text": announcement.text, "at": at})
    return {"at": at}
