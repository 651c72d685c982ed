"""The settings of the chat: every UPPER_CASE name that fastapi-channels knows; `main.py` names this module."""

CHANNEL_LAYERS = {"default": "memory://"}

# Browsers can't read the HTTP status of a refused WebSocket, so accept it and close with a code that they can read.
REJECT_MODE = "close"
