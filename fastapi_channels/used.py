"""Channels for common uses."""

from __future__ import annotations

from fastapi_channels.channels import Channel

__all__ = ["GroupChannel", "PersonChannel"]


class GroupChannel(Channel):
    """A channel for a group: 200 connections at most."""

    max_connection = 200


class PersonChannel(Channel):
    """A channel for two."""

    max_connection = 2
