"""A chat with rooms: `uvicorn examples.chat.main:app`, or `scripts/demo`."""
