"""The same calls written in every format, by hand from each model's published template."""

from __future__ import annotations

from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                    "parts": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
WEATHER = {"name": "get_weather", "arguments": {"city": "São Paulo", "days": 3}}
NOW: dict[str, Any] = {"name": "now", "arguments": {}}

# format: (opening text, weather call, now call, text between calls, closing text)
TEXTS: dict[str, tuple[str, str, str, str, str]] = {
    "json_tools": (
        "<tool_call>\n",
        '{"name": "get_weather", "arguments": {"city": "São Paulo", "days": 3}}',
        '{"name": "now", "arguments": {}}',
        "\n</tool_call>\n<tool_call>\n",
        "\n</tool_call>",
    ),
    "qwen3_coder": (
        "<tool_call>\n",
        "<function=get_weather>\n<parameter=city>\nSão Paulo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>",
        "<function=now>\n</function>",
        "\n</tool_call>\n<tool_call>\n",
        "\n</tool_call>",
    ),
    "glm47": (
        "<tool_call>",
        "get_weather<arg_key>city</arg_key><arg_value>São Paulo</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value>",
        "now",
        "</tool_call><tool_call>",
        "</tool_call>",
    ),
    "longcat": (
        "<longcat_tool_call>",
        "get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>São Paulo</longcat_arg_value>\n"
        "<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>3</longcat_arg_value>\n",
        '{"name": "now", "arguments": {}}',
        "</longcat_tool_call>\n<longcat_tool_call>",
        "</longcat_tool_call>",
    ),
    "minicpm5": (
        "",
        '<function name="get_weather"><param name="city">São Paulo</param><param name="days">3</param></function>',
        '<function name="now"></function>',
        "\n",
        "",
    ),
    "minimax_m2": (
        "<minimax:tool_call>\n",
        '<invoke name="get_weather">\n<parameter name="city">São Paulo</parameter>\n'
        '<parameter name="days">3</parameter>\n'
        "</invoke>",
        '<invoke name="now">\n</invoke>',
        "\n",
        "\n</minimax:tool_call>",
    ),
    "muse_spark": (
        "<atem:function_calls>\n",
        '<atem:invoke name="get_weather">\n<atem:parameter name="city">São Paulo</atem:parameter>\n'
        '<atem:parameter name="days">3</atem:parameter>\n</atem:invoke>',
        '<atem:invoke name="now">\n</atem:invoke>',
        "\n",
        "\n</atem:function_calls>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "São Paulo", "days": 3}'
        "<|tool_call_end|>",
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "",
        "<|tool_calls_section_end|>",
    ),
    "kimi_k3": (
        "<|open|>tools<|sep|>",
        '<|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>São Paulo'
        '<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
        "<|close|>call<|sep|>",
        '<|open|>call tool="now" index="2"<|sep|><|open|>json type="object"<|sep|>{}<|close|>json<|sep|>'
        "<|close|>call<|sep|>",
        "",
        "<|close|>tools<|sep|>",
    ),
    "mistral": (
        "[TOOL_CALLS]",
        'get_weather[ARGS]{"city": "São Paulo", "days": 3}',
        "now[ARGS]{}",
        "[TOOL_CALLS]",
        "",
    ),
    "pythonic": (
        "<|tool_call_start|>[",
        'get_weather(city="São Paulo", days=3)',
        "now()",
        ", ",
        "]<|tool_call_end|>",
    ),
    "gemma4": (
        "<|tool_call>",
        'call:get_weather{city:<|"|>São Paulo<|"|>,days:3}',
        "call:now{}",
        "<tool_call|><|tool_call>",
        "<tool_call|>",
    ),
    "function_gemma": (
        "<start_function_call>",
        "call:get_weather{city:<escape>São Paulo<escape>,days:3}",
        "call:now{}",
        "<end_function_call><start_function_call>",
        "<end_function_call>",
    ),
}
TEXTS["laguna"] = TEXTS["glm47"]


def one(name: str) -> str:
    """The weather call alone."""
    opening, weather, _, _, closing = TEXTS[name]
    return opening + weather + closing


def two(name: str) -> str:
    """The weather call, then the other."""
    opening, weather, now, between, closing = TEXTS[name]
    return opening + weather + between + now + closing
