"""Streams in the forms that public providers document, with the text and the end each of them stands for."""

# ruff: noqa: E501  recorded lines stay whole

import json
from dataclasses import dataclass, field

from oncewise.model import FinishReason, Usage
from oncewise.ports import Completion

__all__ = ["ANTHROPIC_RECORDED", "GEMINI_RECORDED", "RECORDED", "WHOLE", "Native", "Recorded"]


@dataclass(frozen=True)
class Recorded:
    """One stream and what it means.

    Attributes:
        provider: Its name in the catalogue, whose quirks are needed to read it.
    """

    name: str
    body: bytes
    text: str
    completion: Completion
    provider: str = "openai"


_OPENAI = (
    'data: {"id":"chatcmpl-9","object":"chat.completion.chunk","created":1,"model":"gpt-6","choices":'
    '[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-9","model":"gpt-6","choices":[{"index":0,"delta":{"content":"Grüß"},"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-9","model":"gpt-6","choices":[{"index":0,"delta":{"content":" dich 🙂"},"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-9","model":"gpt-6","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-9","model":"gpt-6","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13}}\n\n'
    "data: [DONE]\n\n"
)
_PERPLEXITY = (
    'data: {"id":"p1","model":"sonar","created":1,"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4},'
    '"citations":["https://example.org/a"],"search_results":[{"title":"A","url":"https://example.org/a"}],"object":"chat.completion.chunk",'
    '"choices":[{"index":0,"finish_reason":null,"message":{"role":"assistant","content":"Yes"},"delta":{"role":"assistant","content":"Yes"}}]}\r\n\r\n'
    'data: {"id":"p1","model":"sonar","created":1,"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"cost":{"total_cost":0.0051}},'
    '"citations":["https://example.org/a"],"search_results":[{"title":"A","url":"https://example.org/a"}],"object":"chat.completion.done",'
    '"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"Yes [1]"},"delta":{"content":" [1]"}}]}\r\n\r\n'
)
_MOONSHOT = (
    'data: {"id":"k1","model":"kimi-k2.6","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    'data: {"id":"k1","model":"kimi-k2.6","choices":[{"index":0,"delta":{"reasoning_content":"hm"},"finish_reason":null}]}\n\n'
    'data: {"id":"k1","model":"kimi-k2.6","choices":[{"index":0,"delta":{"content":"你好"},"finish_reason":null}]}\n\n'
    'data: {"id":"k1","model":"kimi-k2.6","choices":[{"index":0,"delta":{},"finish_reason":"length",'
    '"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10}}]}\n\n'
    "data: [DONE]\n\n"
)
_OPENROUTER = (
    ": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"
    'data: {"id":"gen-1","provider":"X","model":"x/y","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null,'
    '"native_finish_reason":null}]}\n\n'
    'data: {"id":"gen-1","provider":"X","model":"x/y","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop",'
    '"native_finish_reason":"end_turn"}]}\n\n'
    'data: {"id":"gen-1","provider":"X","model":"x/y","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],'
    '"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6,"cost":0.00042}}\n\n'
    "data: [DONE]\n\n"
)
_MISTRAL = (
    'data: {"id":"m1","model":"magistral","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    'data: {"id":"m1","model":"magistral","choices":[{"index":0,"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"hm"}]}]},'
    '"finish_reason":null}]}\n\n'
    'data: {"id":"m1","model":"magistral","choices":[{"index":0,"delta":{"content":[{"type":"text","text":"Bon"}]},"finish_reason":null}]}\n\n'
    'data: {"id":"m1","model":"magistral","choices":[{"index":0,"delta":{"content":"jour"},"finish_reason":"model_length"}],'
    '"usage":{"prompt_tokens":4,"completion_tokens":3,"total_tokens":7}}\n\n'
    "data: [DONE]\n\n"
)
_OLLAMA = (
    'data: {"id":"o1","object":"chat.completion.chunk","model":"llama3.2","system_fingerprint":"fp_ollama","choices":'
    '[{"index":0,"delta":{"role":"assistant","content":"Yo"},"finish_reason":null}]}\n\n'
    'data: {"id":"o1","object":"chat.completion.chunk","model":"llama3.2","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
    '"finish_reason":null}]}\n\n'
    'data: {"id":"o1","object":"chat.completion.chunk","model":"llama3.2","choices":[],"usage":{"prompt_tokens":6,"completion_tokens":1,"total_tokens":7}}\n\n'
    "data: [DONE]\n\n"
)
_GROQ = (
    'data: {"id":"chatcmpl-g","object":"chat.completion.chunk","created":1,"model":"gemma2-9b-it","system_fingerprint":"fp_1","choices":[{"index":0,'
    '"delta":{"role":"assistant","content":"","tool_calls":[]},"logprobs":null,"finish_reason":null}],"x_groq":{"id":"req_1"}}\n\n'
    'data: {"id":"chatcmpl-g","object":"chat.completion.chunk","created":1,"model":"gemma2-9b-it","choices":[{"index":0,'
    '"delta":{"content":"Hé","tool_calls":[]},"logprobs":null,"finish_reason":null}]}\n\n'
    'data: {"id":"chatcmpl-g","object":"chat.completion.chunk","created":1,"model":"gemma2-9b-it","choices":[{"index":0,"delta":{},"logprobs":null,'
    '"finish_reason":"stop"}],"x_groq":{"id":"req_1","usage":{"queue_time":0.02,"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}}\n\n'
    'data: {"id":"chatcmpl-g","object":"chat.completion.chunk","created":1,"model":"gemma2-9b-it","choices":[],"usage":{"queue_time":0.02,'
    '"prompt_tokens":10,"completion_tokens":2,"total_tokens":12}}\n\n'
    "data: [DONE]\n\n"
)
_DEEPSEEK = (
    ": keep-alive\n\n: keep-alive\n\n"
    'data: {"id":"d1","object":"chat.completion.chunk","created":1,"model":"deepseek-flash","choices":[{"index":0,"delta":{"role":"assistant",'
    '"content":null,"reasoning_content":"Hm. "},"logprobs":null,"finish_reason":null}]}\n\n: keep-alive\n\n'
    'data: {"id":"d1","object":"chat.completion.chunk","created":1,"model":"deepseek-flash","choices":[{"index":0,"delta":{"content":null,'
    '"reasoning_content":"好"},"logprobs":null,"finish_reason":null}]}\n\n'
    'data: {"id":"d1","object":"chat.completion.chunk","created":1,"model":"deepseek-flash","choices":[{"index":0,"delta":{"content":"答",'
    '"reasoning_content":null},"logprobs":null,"finish_reason":null}]}\n\n'
    'data: {"id":"d1","object":"chat.completion.chunk","created":1,"model":"deepseek-flash","choices":[{"index":0,"delta":{"content":"",'
    '"reasoning_content":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":17,"completion_tokens":9,"total_tokens":26,'
    '"completion_tokens_details":{"reasoning_tokens":7},"prompt_cache_hit_tokens":0,"prompt_cache_miss_tokens":17}}\n\n'
    "data: [DONE]\n\n"
)
_XAI = (
    'data: {"id":"x1","object":"chat.completion.chunk","created":1,"model":"grok-4.3","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"}}],'
    '"usage":{"prompt_tokens":41,"completion_tokens":0,"total_tokens":41,"num_sources_used":0},"system_fingerprint":"fp_2"}\n\n'
    'data: {"id":"x1","object":"chat.completion.chunk","created":1,"model":"grok-4.3","choices":[{"index":0,"delta":{"role":"assistant","content":"!"},'
    '"finish_reason":"stop"}],"usage":{"prompt_tokens":41,"completion_tokens":2,"total_tokens":43,"num_sources_used":1},"citations":["https://example.org/a"]}\n\n'
    "data: [DONE]\n\n"
)
_TOOLS = (
    'data: {"id":"chatcmpl-t","object":"chat.completion.chunk","created":7,"model":"gpt-6","service_tier":"default","system_fingerprint":"fp_3","choices":'
    '[{"index":0,"delta":{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"call_A","type":"function","function":{"name":"weather",'
    '"arguments":""}}],"refusal":null},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x1"}\n\n'
    'data: {"id":"chatcmpl-t","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,'
    '"function":{"arguments":"{\\"city\\": \\"K"}}]},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x22"}\n\n'
    'data: {"id":"chatcmpl-t","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,'
    '"function":{"arguments":"öln\\"}"}}]},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-t","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{"tool_calls":[{"index":1,"id":"call_B",'
    '"type":"function","function":{"name":"now","arguments":"{}"}}]},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-t","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{},"logprobs":null,'
    '"finish_reason":"tool_calls"}],"usage":null}\n\n'
    'data: {"id":"chatcmpl-t","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[],"usage":{"prompt_tokens":60,"completion_tokens":31,'
    '"total_tokens":91,"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
    "data: [DONE]\n\n"
)
_LOGPROBS = (
    'data: {"id":"chatcmpl-l","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{"role":"assistant","content":"é"},'
    '"logprobs":{"content":[{"token":"é","logprob":-0.5,"bytes":[195,169],"top_logprobs":[]}],"refusal":null},"finish_reason":null}]}\n\n'
    'data: {"id":"chatcmpl-l","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{"content":"!"},'
    '"logprobs":{"content":[{"token":"!","logprob":-0.1,"bytes":[33],"top_logprobs":[]}],"refusal":null},"finish_reason":null}]}\n\n'
    'data: {"id":"chatcmpl-l","object":"chat.completion.chunk","created":7,"model":"gpt-6","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    "data: [DONE]\n\n"
)
_ODD = (
    "\ufeff: a mark first, lines that end with CR, an event over two lines, fields nobody asked for\r\r"
    "id: 7\rretry: 3000\revent: chunk\r"
    'data: {"model":"odd","choices":[{"index":0,\rdata:  "delta":{"content":"a\u2028b\u0085c"}}]}\r\r'
    "unknown: field\rdata\r\r"
    'data:{"choices":[{"index":1,"delta":{"content":"not mine"}},{"index":0,"delta":{},"finish_reason":"stop"}]}\r\r'
    "data:[DONE]\r\r"
)

_CITED = ("https://example.org/a",)
RECORDED = (
    Recorded("openai", _OPENAI.encode(), "Grüß dich 🙂", Completion(FinishReason.STOP, Usage(9, 4), "gpt-6")),
    Recorded(
        "perplexity",
        _PERPLEXITY.encode(),
        "Yes [1]",
        Completion(FinishReason.STOP, Usage(3, 2), "sonar", _CITED, 0.0051),
        "perplexity",
    ),
    Recorded("moonshot", _MOONSHOT.encode(), "你好", Completion(FinishReason.LENGTH, Usage(8, 2), "kimi-k2.6"), "kimi"),
    Recorded(
        "openrouter",
        _OPENROUTER.encode(),
        "Hi",
        Completion(FinishReason.STOP, Usage(5, 1), "x/y", None, 0.00042),
        "openrouter",
    ),
    Recorded(
        "mistral", _MISTRAL.encode(), "Bonjour", Completion(FinishReason.LENGTH, Usage(4, 3), "magistral"), "mistral"
    ),
    Recorded("ollama", _OLLAMA.encode(), "Yo", Completion(FinishReason.STOP, Usage(6, 1), "llama3.2"), "ollama"),
    Recorded("groq", _GROQ.encode(), "Hé", Completion(FinishReason.STOP, Usage(10, 2), "gemma2-9b-it"), "groq"),
    Recorded(
        "deepseek", _DEEPSEEK.encode(), "答", Completion(FinishReason.STOP, Usage(17, 9), "deepseek-flash"), "deepseek"
    ),
    Recorded("xai", _XAI.encode(), "Hi!", Completion(FinishReason.STOP, Usage(41, 2), "grok-4.3", _CITED), "xai"),
    Recorded("logprobs", _LOGPROBS.encode(), "é!", Completion(FinishReason.STOP, None, "gpt-6")),
    Recorded("odd", _ODD.encode(), "a\u2028b\u0085c", Completion(FinishReason.STOP, None, "odd")),
)

_HEAD = {"object": "chat.completion", "created": 1}
_PLAIN = {"index": 0, "finish_reason": "stop", "logprobs": None}
WHOLE = {
    "openai-tools": (
        "openai",
        _TOOLS.encode(),
        {
            "id": "chatcmpl-t",
            "object": "chat.completion",
            "created": 7,
            "model": "gpt-6",
            "service_tier": "default",
            "system_fingerprint": "fp_3",
            "obfuscation": "x22",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "tool_calls",
                    "logprobs": None,
                    "message": {
                        "role": "assistant",
                        "content": None,
                        "refusal": None,
                        "tool_calls": [
                            {
                                "id": "call_A",
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
                            },
                            {"id": "call_B", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                        ],
                    },
                }
            ],
            "usage": {
                "prompt_tokens": 60,
                "completion_tokens": 31,
                "total_tokens": 91,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        },
    ),
    "openai-logprobs": (
        "openai",
        _LOGPROBS.encode(),
        {
            "id": "chatcmpl-l",
            "object": "chat.completion",
            "created": 7,
            "model": "gpt-6",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "logprobs": {
                        "content": [
                            {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []},
                            {"token": "!", "logprob": -0.1, "bytes": [33], "top_logprobs": []},
                        ],
                        "refusal": None,
                    },
                    "message": {"role": "assistant", "content": "é!"},
                }
            ],
            "usage": {},
        },
    ),
    "perplexity": (
        "perplexity",
        _PERPLEXITY.encode(),
        {
            **_HEAD,
            "id": "p1",
            "model": "sonar",
            "citations": ["https://example.org/a"],
            "search_results": [{"title": "A", "url": "https://example.org/a"}],
            "choices": [{**_PLAIN, "message": {"role": "assistant", "content": "Yes [1]"}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "cost": {"total_cost": 0.0051}},
        },
    ),
    "moonshot": (
        "kimi",
        _MOONSHOT.encode(),
        {
            "id": "k1",
            "object": "chat.completion",
            "model": "kimi-k2.6",
            "choices": [
                {
                    **_PLAIN,
                    "finish_reason": "length",
                    "message": {"role": "assistant", "content": "你好", "reasoning_content": "hm"},
                    "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
                }
            ],
            "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
        },
    ),
    "openrouter": (
        "openrouter",
        _OPENROUTER.encode(),
        {
            "id": "gen-1",
            "object": "chat.completion",
            "provider": "X",
            "model": "x/y",
            "choices": [
                {**_PLAIN, "native_finish_reason": "end_turn", "message": {"role": "assistant", "content": "Hi"}}
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6, "cost": 0.00042},
        },
    ),
    "ollama": (
        "ollama",
        _OLLAMA.encode(),
        {
            "id": "o1",
            "object": "chat.completion",
            "model": "llama3.2",
            "system_fingerprint": "fp_ollama",
            "choices": [{**_PLAIN, "message": {"role": "assistant", "content": "Yo"}}],
            "usage": {"prompt_tokens": 6, "completion_tokens": 1, "total_tokens": 7},
        },
    ),
    "deepseek": (
        "deepseek",
        _DEEPSEEK.encode(),
        {
            **_HEAD,
            "id": "d1",
            "model": "deepseek-flash",
            "choices": [{**_PLAIN, "message": {"role": "assistant", "content": "答", "reasoning_content": "Hm. 好"}}],
            "usage": {
                "prompt_tokens": 17,
                "completion_tokens": 9,
                "total_tokens": 26,
                "completion_tokens_details": {"reasoning_tokens": 7},
                "prompt_cache_hit_tokens": 0,
                "prompt_cache_miss_tokens": 17,
            },
        },
    ),
}
"""Name → its provider in the catalogue, the stream, and the whole completion it adds up to."""


# -- wires of their own -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Native:
    """One stream of another wire and what it means.

    Attributes:
        calls: `(id, name, arguments)` of the tool calls.
        reasoning: The text of the model's thinking.
        usage_extras: Fields of the figures beside the three counts.
    """

    name: str
    body: bytes
    text: str
    completion: Completion
    finish: str
    calls: tuple[tuple[str, str, str], ...] = ()
    reasoning: str = ""
    usage_extras: dict[str, object] = field(default_factory=dict)


def _events(*blocks: str) -> bytes:
    return "".join(
        f"event: {json.loads(block)['type']}\ndata: {block}\n\n" if '"type"' in block[:9] else f"data: {block}\r\n\r\n"
        for block in blocks
    ).encode()


_CLAUDE_START = (
    '{"type":"message_start","message":{"id":"msg_1nZ","type":"message","role":"assistant","content":[],"model":"claude-haiku-5-5",'
    '"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":25,"cache_creation_input_tokens":3,"cache_read_input_tokens":12,"output_tokens":1,'
    '"service_tier":"standard"}}}'
)
_CLAUDE_TEXT = _events(
    _CLAUDE_START,
    '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
    '{"type": "ping"}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Grüß"}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" dich 🙂"}}',
    '{"type":"content_block_stop","index":0}',
    '{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":15}}',
    '{"type":"message_stop"}',
)
_CLAUDE_TOOLS = _events(
    _CLAUDE_START,
    '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Two "}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"cities."}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"EqQBCg=="}}',
    '{"type":"content_block_stop","index":0}',
    '{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}',
    '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Let me look."}}',
    '{"type":"content_block_stop","index":1}',
    '{"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"toolu_A","name":"weather","input":{}}}',
    '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":""}}',
    '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\": \\"K"}}',
    '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"öln\\"}"}}',
    '{"type":"content_block_stop","index":2}',
    '{"type":"content_block_start","index":3,"content_block":{"type":"tool_use","id":"toolu_B","name":"now","input":{}}}',
    '{"type":"content_block_stop","index":3}',
    '{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"output_tokens":89}}',
    '{"type":"message_stop"}',
)
_CLAUDE_SEARCH = _events(
    _CLAUDE_START,
    '{"type":"content_block_start","index":0,"content_block":{"type":"server_tool_use","id":"srvtoolu_1","name":"web_search","input":{}}}',
    '{"type":"content_block_delta","index":0,"delta":{"type":"input_json_delta","partial_json":"{\\"query\\":\\"x\\"}"}}',
    '{"type":"content_block_stop","index":0}',
    '{"type":"content_block_start","index":1,"content_block":{"type":"web_search_tool_result","tool_use_id":"srvtoolu_1","content":'
    '[{"type":"web_search_result","title":"A","url":"https://example.org/a","encrypted_content":"E","page_age":null}]}}',
    '{"type":"content_block_stop","index":1}',
    '{"type":"content_block_start","index":2,"content_block":{"type":"text","text":"","citations":[]}}',
    '{"type":"content_block_delta","index":2,"delta":{"type":"citations_delta","citation":{"type":"web_search_result_location",'
    '"cited_text":"c","url":"https://example.org/a","title":"A","encrypted_index":"I"}}}',
    '{"type":"content_block_delta","index":2,"delta":{"type":"text_delta","text":"Yes"}}',
    '{"type":"content_block_stop","index":2}',
    '{"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},"usage":{"input_tokens":100,'
    '"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":510,"server_tool_use":{"web_search_requests":1}}}',
    '{"type":"message_stop"}',
)
_GEMINI_TEXT = _events(
    '{"candidates": [{"content": {"parts": [{"text": "Weighing it.","thought": true}],"role": "model"},"index": 0}],"usageMetadata": '
    '{"promptTokenCount": 8,"totalTokenCount": 30,"promptTokensDetails": [{"modality": "TEXT","tokenCount": 8}],"thoughtsTokenCount": 22},'
    '"modelVersion": "gemini-3.5-flash-lite","responseId": "Il0taoSY"}',
    '{"candidates": [{"content": {"parts": [{"text": "Grüß"}],"role": "model"},"index": 0}],"usageMetadata": '
    '{"promptTokenCount": 8,"candidatesTokenCount": 2,"totalTokenCount": 32,"thoughtsTokenCount": 22},'
    '"modelVersion": "gemini-3.5-flash-lite","responseId": "Il0taoSY"}',
    '{"candidates": [{"content": {"parts": [{"text": " dich 🙂","thoughtSignature": "EjQKMgEM"}],"role": "model"},"finishReason": "STOP","index": 0,'
    '"safetyRatings": [{"category": "HARM_CATEGORY_HARASSMENT","probability": "NEGLIGIBLE"}],"groundingMetadata": {"groundingChunks": '
    '[{"web": {"uri": "https://example.org/a","title": "example.org"}}],"webSearchQueries": ["x"]}}],"usageMetadata": {"promptTokenCount": 8,'
    '"candidatesTokenCount": 6,"totalTokenCount": 36,"cachedContentTokenCount": 4,"thoughtsTokenCount": 22},'
    '"modelVersion": "gemini-3.5-flash-lite","responseId": "Il0taoSY"}',
)
_GEMINI_TOOLS = _events(
    '{"candidates": [{"content": {"parts": [{"functionCall": {"name": "weather","args": {"city": "Köln"},"id": "fc1"},"thoughtSignature": "Sig=="},'
    '{"functionCall": {"name": "now"}}],"role": "model"},"index": 0}],"usageMetadata": {"promptTokenCount": 40,"candidatesTokenCount": 9,'
    '"totalTokenCount": 49},"modelVersion": "gemini-3.5-flash-lite","responseId": "r2"}',
    '{"candidates": [{"content": {"parts": [{"text": ""}],"role": "model"},"finishReason": "STOP","index": 0}],"usageMetadata": '
    '{"promptTokenCount": 40,"candidatesTokenCount": 12,"totalTokenCount": 52,"toolUsePromptTokenCount": 5},'
    '"modelVersion": "gemini-3.5-flash-lite","responseId": "r2"}',
)
_GEMINI_CUT = _events(
    '{"candidates": [{"content": {"parts": [{"text": "Bon"},{"text": "jour"}],"role": "model"},"finishReason": "MAX_TOKENS","index": 0,'
    '"citationMetadata": {"citationSources": [{"startIndex": 0,"endIndex": 7,"uri": "https://example.org/a"}]}}],'
    '"modelVersion": "gemini-3.5-flash-lite","responseId": "r3"}',
)

_CLAUDE = "claude-haiku-5-5"
_GEMINI = "gemini-3.5-flash-lite"
_SEARCHED = {
    "type": "web_search_result_location", "cited_text": "c", "url": "https://example.org/a", "title": "A", "encrypted_index": "I",
}  # fmt: skip
_GROUNDED = {"web": {"uri": "https://example.org/a", "title": "example.org"}}
ANTHROPIC_RECORDED = (
    Native(
        "text",
        _CLAUDE_TEXT,
        "Grüß dich 🙂",
        Completion(FinishReason.STOP, Usage(40, 15), _CLAUDE),
        "stop",
        usage_extras={"cache_read_input_tokens": 12, "cache_creation_input_tokens": 3, "service_tier": "standard"},
    ),
    Native(
        "tools",
        _CLAUDE_TOOLS,
        "Let me look.",
        Completion(FinishReason.TOOL_CALLS, Usage(40, 89), _CLAUDE),
        "tool_calls",
        (("toolu_A", "weather", '{"city": "Köln"}'), ("toolu_B", "now", "{}")),
        "Two cities.",
    ),
    Native(
        "search",
        _CLAUDE_SEARCH,
        "Yes",
        Completion(FinishReason.LENGTH, Usage(100, 510), _CLAUDE, (_SEARCHED,)),
        "length",
        usage_extras={"server_tool_use": {"web_search_requests": 1}},
    ),
)
GEMINI_RECORDED = (
    Native(
        "text",
        _GEMINI_TEXT,
        "Grüß dich 🙂",
        Completion(FinishReason.STOP, Usage(8, 28), _GEMINI, (_GROUNDED,)),
        "stop",
        reasoning="Weighing it.",
        usage_extras={
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 22},
        },
    ),
    Native(
        "tools",
        _GEMINI_TOOLS,
        "",
        Completion(FinishReason.TOOL_CALLS, Usage(45, 12), _GEMINI),
        "tool_calls",
        (("fc1", "weather", '{"city":"Köln"}'), ("call_r2_1", "now", "{}")),
    ),
    Native(
        "cut",
        _GEMINI_CUT,
        "Bonjour",
        Completion(
            FinishReason.LENGTH, None, _GEMINI, ({"startIndex": 0, "endIndex": 7, "uri": "https://example.org/a"},)
        ),
        "length",
    ),
)
