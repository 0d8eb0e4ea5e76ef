"""Chat completion requests in the words of Anthropic and Gemini: said otherwise, left out, passed or refused."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncewise.errors import InvalidRequest
from oncewise.providers.anthropic_request import messages_request
from oncewise.providers.gemini_request import generate_path, generate_request

SECRET = "a value that must never stand in an error"
USER = {"role": "user", "content": "hi"}
PNG = "data:image/png;base64,iVBORw0KGgo="
PDF = "data:application/pdf;base64,JVBERi0="
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}, "strict": True},
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
            "extra_content": {"google": {"thought_signature": "Sig=="}},
        },
        {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "c1", "content": '{"sky":"grey"}'},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
]


def claude(**fields: Any) -> dict[str, Any]:
    return messages_request({"model": "claude-x", "messages": [USER], **fields})


def gemini(**fields: Any) -> dict[str, Any]:
    return generate_request({"model": "gemini-x", "messages": [USER], **fields})


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


# -- conversations -----------------------------------------------------------------------------------------------


def test_a_plain_question_is_said_on_both_wires() -> None:
    """And nothing that was not given."""
    assert claude() == {
        "model": "claude-x",
        "max_tokens": 16_384,
        "messages": [{"role": "user", "content": [text("hi")]}],
        "stream": True,
    }
    assert gemini() == {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}


CONVERSATION = [
    {"role": "system", "content": "one"},
    {"role": "developer", "content": [text("two")]},
    USER,
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": ""},
    {"role": "user", "content": "a"},
    {"role": "system", "content": "late"},
]


def test_system_messages_lead_and_late_ones_are_the_users() -> None:
    """Neighbours of one role are one message; empty texts, which both refuse, are left out."""
    asked = claude(messages=CONVERSATION)
    assert asked["system"] == [text("one"), text("two")]
    assert asked["messages"] == [
        {"role": "user", "content": [text("hi")]},
        {"role": "assistant", "content": [text("hello")]},
        {"role": "user", "content": [text("a"), text("late")]},
    ]
    asked = gemini(messages=CONVERSATION)
    assert asked["systemInstruction"] == {"parts": [{"text": "one"}, {"text": "two"}]}
    assert asked["contents"] == [
        {"role": "user", "parts": [{"text": "hi"}]},
        {"role": "model", "parts": [{"text": "hello"}]},
        {"role": "user", "parts": [{"text": "a"}, {"text": "late"}]},
    ]


def test_tool_calls_and_their_results_go_back_to_anthropic() -> None:
    """All results of one turn are one user message: the wire refuses them apart."""
    assert claude(messages=[USER, CALLED, *RESULTS, USER])["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "c2", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [text('{"sky":"grey"}')]},
                {"type": "tool_result", "tool_use_id": "c2", "content": [text("noon")]},
                text("hi"),
            ],
        },
    ]


def test_tool_calls_and_their_results_go_back_to_gemini() -> None:
    """By name, with the ids and the thought signature the calls came with; a result is always an object."""
    assert gemini(messages=[USER, CALLED, *RESULTS])["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {
                    "functionCall": {"id": "c1", "name": "weather", "args": {"city": "Köln"}},
                    "thoughtSignature": "Sig==",
                },
                {"functionCall": {"id": "c2", "name": "now", "args": {}}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"id": "c1", "name": "weather", "response": {"sky": "grey"}}},
                {"functionResponse": {"id": "c2", "name": "now", "response": {"result": "noon"}}},
            ],
        },
    ]


def test_signed_thinking_goes_back_before_what_followed_it() -> None:
    """As an earlier answer carried it."""
    block = {"type": "thinking", "thinking": "hm", "signature": "S"}
    said = {"role": "assistant", "content": "so", "thinking_blocks": [block]}
    assert claude(messages=[USER, said, USER])["messages"][1]["content"] == [block, text("so")]


def test_images_files_and_sound() -> None:
    """As data or by https URL; a part nobody knows passes as it is."""
    own = {"type": "search_result", "title": "t"}
    shown = [
        {**text("see"), "annotations": []},
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
        own,
    ]
    assert claude(messages=[{"role": "user", "content": shown}])["messages"][0]["content"] == [
        text("see"),
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}},
        own,
    ]
    shown.append({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}})
    assert gemini(messages=[{"role": "user", "content": shown}])["contents"][0]["parts"] == [
        {"text": "see"},
        {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}},
        {"fileData": {"fileUri": "https://example.org/a.png"}},
        {"inlineData": {"mimeType": "application/pdf", "data": "JVBERi0="}},
        own,
        {"inlineData": {"mimeType": "audio/wav", "data": "UklGRg=="}},
    ]


def test_marks_for_anthropics_cache_stay_where_they_are() -> None:
    """On texts, images and tools."""
    mark = {"cache_control": {"type": "ephemeral"}}
    content = [{**text("long"), **mark}, {"type": "image_url", "image_url": {"url": PNG}, **mark}]
    asked = claude(messages=[{"role": "user", "content": content}], tools=[{**WEATHER, **mark}])
    assert [block.get("cache_control") for block in asked["messages"][0]["content"]] == [mark["cache_control"]] * 2
    assert asked["tools"][0]["cache_control"] == mark["cache_control"]


# -- tools -------------------------------------------------------------------------------------------------------


def test_functions_are_declared_and_other_tools_pass() -> None:
    """Searching, for one, is a tool of the provider's own."""
    search = {"type": "web_search_20250305", "name": "web_search"}
    bare = {"type": "function", "function": {"name": "now"}}
    assert claude(tools=[WEATHER, bare, search])["tools"] == [
        {"name": "weather", "description": "of a city", "strict": True, "input_schema": {"type": "object"}},
        {"name": "now", "input_schema": {"type": "object", "properties": {}}},
        search,
    ]
    search = {"google_search": {}}
    assert gemini(tools=[WEATHER, bare, search])["tools"] == [
        {
            "functionDeclarations": [
                {"name": "weather", "description": "of a city", "parametersJsonSchema": {"type": "object"}},
                {"name": "now"},
            ]
        },
        search,
    ]


ONE = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("choice", "parallel", "anthropics", "geminis"),
    [
        (None, None, None, None),
        ("auto", None, {"type": "auto"}, {"mode": "AUTO"}),
        ("none", False, {"type": "none"}, {"mode": "NONE"}),
        ("required", None, {"type": "any"}, {"mode": "ANY"}),
        (ONE, None, {"type": "tool", "name": "weather"}, {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
        (None, False, {"type": "auto", "disable_parallel_tool_use": True}, None),
        ("required", False, {"type": "any", "disable_parallel_tool_use": True}, {"mode": "ANY"}),
    ],
)
def test_which_tool_must_be_used(choice: Any, parallel: Any, anthropics: Any, geminis: Any) -> None:
    """And, with Anthropic, whether several at once may be."""
    asked = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": parallel}
    assert claude(**asked).get("tool_choice") == anthropics
    assert gemini(**asked).get("toolConfig", {}).get("functionCallingConfig") == geminis


# -- the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "claude-3-haiku-20240307"}, 4096),
        ({"model": "claude-3-5-haiku-latest"}, 8192),
        ({"model": "claude-opus-5-5"}, 16_384),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, 26_384),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
    ],
)
def test_anthropic_is_always_told_how_long_an_answer_may_be(fields: dict[str, Any], expected: int) -> None:
    """It refuses requests that do not say, and those that ask a model for more than it has."""
    assert claude(**fields)["max_tokens"] == expected


def test_what_has_no_meaning_is_left_out_and_the_rest_passes() -> None:
    """Both refuse fields they do not know, so OpenAI's own are not sent; theirs are."""
    openais = {
        "seed": 7, "logit_bias": {"5": 1}, "n": 1, "stream": True, "stream_options": {"include_usage": True},
        "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k", "top_p": None,
    }  # fmt: skip
    assert claude(**openais, top_k=5, stop="END", user="u1", temperature=2) == claude() | {
        "top_k": 5,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u1"},
        "temperature": 1,
    }
    asked = gemini(**openais, safetySettings=[{}], generationConfig={"topK": 3}, user="u1", stop="END", logprobs=True)
    assert asked == gemini() | {
        "safetySettings": [{}],
        "generationConfig": {"topK": 3, "seed": 7, "stopSequences": ["END"], "responseLogprobs": True},
    }


SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


def test_answers_in_json() -> None:
    """By schema on both wires; without one on Gemini's only."""
    assert claude(response_format=SCHEMA)["output_config"] == {
        "format": {"type": "json_schema", "schema": {"type": "object"}}
    }
    config = gemini(response_format=SCHEMA)["generationConfig"]
    assert config == {"responseMimeType": "application/json", "responseJsonSchema": {"type": "object"}}
    config = gemini(response_format={"type": "json_object"})["generationConfig"]
    assert config == {"responseMimeType": "application/json"}
    assert claude(response_format={"type": "text"}) == claude()
    assert gemini(response_format={"type": "text"}) == gemini()


def test_how_hard_to_think() -> None:
    """A level, except for Gemini 2.5, which counts tokens."""
    assert claude(reasoning_effort="low")["output_config"] == {"effort": "low"}
    assert gemini(reasoning_effort="low")["generationConfig"] == {"thinkingConfig": {"thinkingLevel": "low"}}
    older = gemini(model="gemini-2.5-flash", reasoning_effort="medium")
    assert older["generationConfig"] == {"thinkingConfig": {"thinkingBudget": 8192}}


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-3.5-flash-lite", "models/gemini-3.5-flash-lite"),
        ("models/gemini-x", "models/gemini-x"),
        ("tunedModels/mine", "tunedModels/mine"),
        ("../../v1/files", "models/..%2F..%2Fv1%2Ffiles"),
        ("models/../files", "models/..%2Ffiles"),
        ("x?key=1#y", "models/x%3Fkey%3D1%23y"),
    ],
)
def test_a_models_name_stays_one_segment_of_the_path(model: str, path: str) -> None:
    """Whoever names a model must not choose what is called with the server's key."""
    assert generate_path(model) == f"{path}:streamGenerateContent?alt=sse"


# -- refused -----------------------------------------------------------------------------------------------------

NOT_JSON = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": SECRET}}]}


@pytest.mark.parametrize("ask", [claude, gemini])
@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": SECRET}, "messages"),
        ({"messages": [SECRET]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [USER, {"role": "tool", "content": SECRET}]}, "messages.1.tool_call_id"),
        ({"messages": [USER, NOT_JSON]}, "messages.1.tool_calls.0.function.arguments"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages.1.tool_calls.0.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function.name"),
        ({"tool_choice": SECRET}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"response_format": {"type": SECRET}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        *(
            ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]},
             "messages.0.content.0.image_url.url")
            for url in (None, SECRET, "http://example.org/a", "data:image/png,x", "data:;base64,x", "file:///etc/x")
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_with_its_place(ask: Any, fields: dict[str, Any], place: str) -> None:
    """Before anything is sent, and without the value."""
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.detail.startswith(f"{place} ")
    assert ".".join(map(str, caught.value.errors[0][0])) == place
    assert SECRET not in caught.value.detail


def test_what_one_wire_alone_cannot_say() -> None:
    """JSON without a schema for Anthropic; results of unknown calls and unknown efforts for Gemini."""
    with pytest.raises(InvalidRequest, match="response_format"):
        claude(response_format={"type": "json_object"})
    with pytest.raises(InvalidRequest, match="tool_call_id"):
        gemini(messages=[USER, RESULTS[0]])
    with pytest.raises(InvalidRequest, match="reasoning_effort"):
        gemini(model="gemini-2.5-pro", reasoning_effort=["x"])


FIELDS = [
    "messages", "role", "content", "tool_calls", "function", "name", "arguments", "tools", "tool_choice", "type",
    "text", "image_url", "url", "stop", "max_tokens", "thinking", "budget_tokens", "response_format", "json_schema",
    "schema", "n", "temperature", "tool_call_id", "id", "extra_content", "google", "file", "file_data", "user",
    "input_audio", "reasoning_effort", "thinking_blocks", "generationConfig", "output_config", "parallel_tool_calls",
]  # fmt: skip
WORDS = ["user", "assistant", "tool", "system", "text", "image_url", "function", "file", "json_schema", "{}", PNG]
bodies = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=14,
)


@pytest.mark.parametrize("translate", [messages_request, generate_request])
@given(body=st.dictionaries(st.sampled_from(FIELDS), bodies, max_size=6))
def test_any_body_is_translated_or_refused(translate: Any, body: dict[str, Any]) -> None:
    """Nothing else is raised, the body is left as it was, and what comes out is JSON."""
    before = json.dumps(body)
    with contextlib.suppress(InvalidRequest):
        json.dumps(translate(body))
    assert json.dumps(body) == before
