"""Answers as models write them: each format's template renders a conversation with such an answer in it this way.

Marks are written out, and calls have the arguments {"city": "Paris", "days": 2} and {"query": "a \\"b\\" <c>\\n"}.
"""

from pymla.text.answers.formats import DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, GLM_45, GLM_47, KIMI_K2

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}},
                "required": ["query"],
                "additionalProperties": False,
            },
        },
    },
]

WEATHER = {"city": "Paris", "days": 2}
QUERY = {"query": 'a "b" <c>\n'}

#: By format: what a model writes behind the prompt's ``<think>``: the reasoning "I need it.", the content "One moment."
#: and the two calls.
TEXTS = {
    DEEPSEEK_V3: (
        "I need it.\n</think>\n\nOne moment.<｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n"
        '{"query": "a \\"b\\" <c>\\n"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    DEEPSEEK_V31: (
        "I need it.</think>One moment.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris", "days": 2}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "a \\"b\\" <c>\\n"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    DEEPSEEK_V32: (
        "I need it.</think>One moment.\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="search">\n'
        '<｜DSML｜parameter name="query" string="true">a "b" <c>\n</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    ),
    KIMI_K2: (
        "I need it.</think>One moment.<|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 2}<|tool_call_end|>'
        "<|tool_call_begin|>functions.search:1<|tool_call_argument_begin|>"
        '{"query": "a \\"b\\" <c>\\n"}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    GLM_45: (
        "I need it.</think>\nOne moment.\n"
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        '<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>a "b" <c>\n</arg_value>\n</tool_call>'
    ),
    GLM_47: (
        "I need it.</think>One moment."
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
        '<tool_call>search<arg_key>query</arg_key><arg_value>a "b" <c>\n</arg_value></tool_call>'
    ),
}

#: The parts of chat templates that tell the formats, as the models' own templates have them.
TEMPLATES = {
    DEEPSEEK_V3: (
        "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
        "tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + "
        "'<｜tool▁call▁end｜>'}}{% if '</think>' in content %}{% endif %}"
    ),
    DEEPSEEK_V31: (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + "
        "tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}{{'<｜Assistant｜></think>'}}"
    ),
    DEEPSEEK_V32: (
        "{%- set dsml_token = '｜DSML｜' -%}{%- set thinking_start_token = '<think>' -%}"
        "{{- '\\n\\n<' + dsml_token + 'function_calls>\\n' -}}"
    ),
    KIMI_K2: (
        "<|tool_calls_section_begin|>{%- for tool_call in message['tool_calls'] -%}"
        "<|tool_call_begin|>{{ formatted_id }}<|tool_call_argument_begin|>{% endfor %}<think>{{rc}}</think>"
    ),
    GLM_45: (
        "{{ '\\n<think></think>' }}{{ '\\n<tool_call>' + tc.name }}\n{% for k, v in _args.items() %}\n"
        "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
    ),
    GLM_47: (
        "{{ '</think>' }}{{- '<tool_call>' + tc.name -}}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>"
        "</tool_call>"
    ),
}
