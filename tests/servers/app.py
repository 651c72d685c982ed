"""An application whose every refusal and ending is asked for by its path; run by the tests of the servers."""

from __future__ import annotations

from fastapi import FastAPI, HTTPException

from fastapi_channels import add_channel
from fastapi_channels.consumers import ActionConsumer, action
from fastapi_channels.routing import ConsumerRouter, route


class Endings(ActionConsumer):
    """Refuse or end as the path says."""

    forward_events = True

    async def connect(self, how: str, number: int = 0) -> None:
        """Do it, or join the group of all."""
        match how:
            case "http":
                raise HTTPException(number, "not so", headers={"Retry-After": "3"})
            case "fail":
                raise ValueError("a secret")
            case "refuse":
                await self.close(number, "not so")
            case "fail-late":
                await self.accept()
                raise ValueError("a secret")
            case _:
                await self.group_add("all")

    @action
    async def say(self, text: str) -> str:
        """Tell everybody, and give it back."""
        await self.group_send("all", {"type": "said", "text": text})
        return text

    @action
    async def bye(self) -> None:
        """Close from inside."""
        await self.close(4600, "bye")

    async def disconnect(self, code: int, reason: str) -> None:
        """Tell the others how it ended."""
        await self.group_send("all", {"type": "ended", "how": self.path_params["how"], "code": code, "reason": reason})


app = FastAPI()
add_channel(app)
app.include_router(
    ConsumerRouter([route("/http/{how}", Endings), route("/close/{how}", Endings, "closing", reject_mode="close")])
)
