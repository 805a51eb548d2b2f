"""What tests of tools and forms share: a template that shows tools and reasoning, a tool, and a call of it."""

# Qwen's way to show tools, and to think.
TEMPLATE = """{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- 'Call with <tool_call></tool_call><|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function.arguments.a|string + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if thinking %}{{ '<think>\n' }}{% elif thinking is defined %}{{ '<think></think>' }}{% endif %}{% endif %}"""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"a": "x", "b": true}}\n</tool_call>'
ARGUMENTS = '{"a": "x", "b": true}'
SILENT = {"chat_template_kwargs": {"thinking": False}}
"""Extra fields for an answer without reasoning."""


def written(text):
    """What makes the model write exactly this."""
    return {"structured_outputs": {"choice": [text]}}
