"""LangChain's ChatOpenAI against a server: prints one JSON document of what it saw.

It runs in an environment of its own (`tests/langchain`), which cannot be locked together with ours.

Usage: python langchain_chat.py BASE_URL               whole answers, streams, tools, errors, leaving
       python langchain_chat.py BASE_URL MODEL READ_S  waits for MODEL, with a read timeout of READ_S
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import httpx2
import openai
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

BASE_URL = sys.argv[1]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def chat(model: str, **fields: Any) -> ChatOpenAI:
    """The client as its documentation makes it."""
    return ChatOpenAI(model=model, base_url=BASE_URL, api_key="sk-any", seed=7, max_retries=0, **fields)


def told(message: AIMessage) -> dict[str, Any]:
    """What an answer says."""
    usage = message.usage_metadata or {}
    return {
        "text": message.content,
        "finish": message.response_metadata.get("finish_reason"),
        "usage": [usage.get("input_tokens"), usage.get("output_tokens"), usage.get("total_tokens")],
        "tools": [[call["name"], call["args"]] for call in message.tool_calls],
    }


def joined(chunks: list[Any]) -> dict[str, Any]:
    """What the chunks of a stream add up to, by LangChain's own addition."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return told(whole)


def named(attempt: Callable[[], object]) -> list[Any]:
    """The error of an attempt; LangChain's are of classes below OpenAI's."""
    try:
        attempt()
    except openai.APIError as error:
        return [getattr(error, "status_code", None), error.code]
    return ["none", None]


async def leave() -> str:
    """Cancel the task that reads a stream, as a web framework does when its own client has gone."""
    began = asyncio.Event()

    async def read() -> None:
        async for _ in chat("openai/n500-gap20-left").astream("hi"):
            began.set()

    reading = asyncio.create_task(read())
    await began.wait()
    reading.cancel()
    try:
        await reading
    except asyncio.CancelledError:
        return "cancelled"
    return "went on"


async def together() -> dict[str, Any]:
    """Whole answers, a stream and a batch of one question at the same time."""
    model = "openai/lat300-n3"

    async def stream() -> dict[str, Any]:
        return joined([chunk async for chunk in chat(model, stream_usage=True).astream("hi")])

    whole, streamed, batch = await asyncio.gather(
        chat(model, include_response_headers=True).ainvoke("hi"), stream(), chat(model).abatch(["hi"] * 8)
    )
    headers = whole.response_metadata["headers"]
    return {
        "whole": {**told(whole), "role": headers["x-coalesce"], "call": headers["x-call-id"]},
        "stream": streamed,
        "burst": [message.content for message in batch],
        "left": await leave(),
    }


def everything() -> dict[str, Any]:
    # One loop for all that is asynchronous: the library keeps its connections from call to call.
    asynchronous = asyncio.run(together())
    tools = chat("openai/tools").bind_tools([WEATHER])
    called = tools.invoke("How is the weather in Riga?")
    back = [HumanMessage("How?"), called, ToolMessage("fine", tool_call_id=called.tool_calls[0]["id"])]
    return {
        **asynchronous,
        "sync": told(chat("openai/n3").invoke("hi")),
        "syncStream": joined(list(chat("openai/n3", stream_usage=True).stream("hi"))),
        "tools": told(called)["tools"],
        "toolsStreamed": joined(list(tools.stream("How?")))["tools"],
        "answered": told(chat("openai/n3-answered").invoke(back))["finish"],
        "errors": {
            "model": named(lambda: chat("nobody/x").invoke("hi")),
            "invalid": named(lambda: chat("openai/n1", n=500).invoke("hi")),
            "provider": named(lambda: chat("openai/err400").invoke("hi")),
            "late": named(lambda: list(chat("openai/n5-cut3").stream("hi"))),
        },
        # The last, since nothing is sent to this provider for the next minute.
        "limit": named(lambda: chat("openai/err429-retryafter200").invoke("hi")),
    }


async def waiting(model: str, read_s: float) -> dict[str, Any]:
    patient = chat(model, timeout=httpx2.Timeout(120.0, read=read_s), stream_usage=True)

    async def stream() -> str:
        return joined([chunk async for chunk in patient.astream("hi")])["text"]

    whole, streamed = await asyncio.gather(chat(model, timeout=120.0).ainvoke("hi"), stream())
    return {"whole": whole.content, "stream": streamed}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(waiting(sys.argv[2], float(sys.argv[3]))) if len(sys.argv) > 2 else everything()))
