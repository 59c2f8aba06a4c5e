"""Conversations, and a chat template that writes tools and calls of them."""

USER, ASSISTANT, SYSTEM = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))

TALK = [
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": " two\n"},
    {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "three"},
]

TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}"
    "<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CALLING = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "five"},
]
